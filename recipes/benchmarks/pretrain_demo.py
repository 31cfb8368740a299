"""Make the demo's base model: tokenizer, then a small Llama trained to read notes and to write charts of them.

Run `python recipes/benchmarks/pretrain_demo.py --out DIR`. The model learns to look facts up, but never sees the
questions of the federated task, nor a note of its train or test split.
"""

import argparse
import itertools
import json
import logging
import math
import random
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import SAFE_WEIGHTS_NAME

from fedfstq_hf.demo.clinic import SPECIALTIES, Note, ask, belongs, notes, write_note

logger = logging.getLogger(__name__)

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
SIGNS = (":", " =", " ->", " is")
# The same questions in plain words, which only the tokenizer sees: it has tokens for more than notes and charts.
PLAIN_QUESTIONS: dict[str, tuple[str, ...]] = {
    "present": ("what does the patient have now?", "which problem is there?"),
    "absent": ("what does the patient not have?", "which problem is ruled out?"),
    "resolved": ("what did the patient have before?", "which problem is over?"),
    "familial": ("what do relatives have?", "which problem lies in the blood?"),
    "kept": ("which drug stays as it is?", "what is not to be changed?"),
    "stopped": ("which drug is no longer given?", "what was ended?"),
    "started": ("which drug is given for the first time?", "what came on top?"),
    "raised": ("which drug is given in a larger dose?", "what went up?"),
}


@dataclass(frozen=True)
class PretrainConfig:
    """Everything that decides the weights, besides the machine's own arithmetic."""

    seed: int = 0
    vocab_size: int = 1024
    hidden_size: int = 128
    layers: int = 3
    heads: int = 4
    intermediate_size: int = 320
    steps: int = 900
    batch_size: int = 32
    learning_rate: float = 3e-3  # of embeddings and norms, by AdamW
    matrix_learning_rate: float = 0.02  # of the matrices, by Muon
    warmup: int = 50
    short_steps: int = 450  # notes grow over so many steps: look-up is learned on short ones first
    copy_weight: float = 0.2  # loss weight of the tokens of a retelling
    context_weight: float = 0.03  # loss weight of all other tokens but the chart's values
    context_share: float = 0.1  # share of those tokens that the loss looks at
    init: float = 0.06


def chart(rng: random.Random, note: Note) -> tuple[str, list[tuple[int, int]]]:
    """Facts of a note in random order, as `kind: term` entries.

    Returns the text and the character spans of its terms: the part that only a reader of the note can know.
    """
    facts = list(note.facts.items())
    rng.shuffle(facts)
    sign = rng.choice(SIGNS)
    text, spans = "chart:", []
    for kind, term in facts:
        text += f" {kind}{sign}"
        spans.append((len(text), len(text) + 1 + len(term)))
        text += f" {term};"
    return text, spans


def documents(seed: int | str, short: int = 0) -> Iterator[tuple[str, list[tuple[int, int]], tuple[int, int]]]:
    """Endless (text, spans of the looked-up terms, span of the retelling) from notes reserved for pretraining.

    Half of the notes are told again before the chart, their sentences in another order: much to copy, from which the
    model learns to find a word again far sooner than from charts alone. The first `short` documents grow in length.
    """
    rng, names, count = random.Random(f"pretrain/{seed}"), tuple(SPECIALTIES), 0
    while True:
        note = write_note(rng, rng.choice(names), min(1.0, 0.25 + 0.75 * count / short) if short else 1.0)
        if belongs(note, "pretrain"):
            table, spans = chart(rng, note)
            head, again = f"note: {note.text}\n", ""
            if rng.random() < 0.5:
                sentences = re.split(r"(?<=[.?]) ", note.text)
                again = f"again: {' '.join(rng.sample(sentences, len(sentences)))}\n"
            front = len(head) + len(again)
            yield (
                head + again + table,
                [(start + front, end + front) for start, end in spans],
                (len(head) + len("again:"), front),
            )
            count += 1


def train_tokenizer(config: PretrainConfig) -> PreTrainedTokenizerFast:
    """Byte-level BPE, so no text has unknown tokens. Every text starts a new word: joined pieces tokenise cleanly."""
    texts = [text for text, _, _ in itertools.islice(documents("tokenizer"), 4000)]
    for note, rng in itertools.islice(notes(1, "train"), 4000):
        question, answer = ask(rng, note, PLAIN_QUESTIONS)
        texts.append(f"question: {question}\nanswer: {answer}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def batches(config: PretrainConfig, tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless (ids, loss weights), both (B, T), drawn in pools of 8 batches sorted by length to save padding."""
    stream = documents(config.seed, config.short_steps * config.batch_size)
    order = random.Random(config.seed)
    while True:
        texts, spans, retold = zip(*itertools.islice(stream, 8 * config.batch_size), strict=True)
        encoded = tokenizer(list(texts), return_offsets_mapping=True)
        rows = []
        for ids, offsets, values, (begin, stop) in zip(
            encoded["input_ids"], encoded["offset_mapping"], spans, retold, strict=True
        ):
            inside = {position for start, end in values for position in range(start + 1, end + 1)}
            each = [
                1.0 if end in inside else config.copy_weight if begin < end <= stop else _context(config, order)
                for _, end in offsets
            ]
            rows.append((ids, each))
        rows.sort(key=lambda row: len(row[0]))
        pool = [rows[i : i + config.batch_size] for i in range(0, len(rows), config.batch_size)]
        order.shuffle(pool)
        for batch in pool:
            longest = max(len(ids) for ids, _ in batch)
            ids = torch.tensor([ids + [tokenizer.pad_token_id] * (longest - len(ids)) for ids, _ in batch])
            weights = torch.tensor([weight + [0.0] * (longest - len(weight)) for _, weight in batch])
            yield ids, weights


def _context(config: PretrainConfig, order: random.Random) -> float:
    share = config.context_share
    return config.context_weight / share if order.random() < share else 0.0


def weighted_loss(model: Any, ids: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Mean next-token loss under `weights` (B, T), and the accuracy where the weight is 1.

    Only positions that count go through the LM head. Padding lies on the right, so no attention mask is needed.
    """
    hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]
    weights, targets = weights[:, 1:], ids[:, 1:]
    counts = weights > 0
    logits, weights, targets = model.lm_head(hidden[counts]), weights[counts], targets[counts]
    losses = F.cross_entropy(logits, targets, reduction="none")
    looked_up = weights == 1.0
    accuracy = (logits[looked_up].argmax(-1) == targets[looked_up]).float().mean().item()
    return (losses * weights).sum() / weights.sum(), accuracy


def make_model(config: PretrainConfig, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of random weights."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.heads,
            intermediate_size=config.intermediate_size,
            max_position_embeddings=512,
            initializer_range=config.init,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def pretrain(config: PretrainConfig, out: Path) -> dict[str, object]:
    """Train tokenizer and model and move them to `out` in one step; returns (and stores) a record of the run."""
    start = time.perf_counter()
    torch.manual_seed(config.seed)
    torch.set_flush_denormal(True)  # once look-up is certain, vanishing gradients would make a step eight times slower
    tokenizer = train_tokenizer(config)
    model = make_model(config, tokenizer)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [
        torch.optim.Muon(matrices, lr=config.matrix_learning_rate, momentum=0.95, weight_decay=0.0),
        torch.optim.AdamW(others, lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]

    def rate(step: int) -> float:
        warm = min(1.0, (step + 1) / config.warmup)
        return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / config.steps)))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    recent: list[tuple[float, float]] = []
    for step, (ids, weights) in zip(range(config.steps), batches(config, tokenizer), strict=False):
        loss, accuracy = weighted_loss(model, ids, weights)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        recent = [*recent[-49:], (loss.item(), accuracy)]
        if step % 50 == 49:
            mean_loss, mean_accuracy = (sum(column) / len(recent) for column in zip(*recent, strict=True))
            spent = time.perf_counter() - start
            logger.info("step %d, loss %.4f, look-up %.3f, %.0f s", step + 1, mean_loss, mean_accuracy, spent)

    record: dict[str, object] = {
        "command": f"python recipes/benchmarks/pretrain_demo.py --out {out.name}",
        "config": asdict(config),
        "parameters": sum(p.numel() for p in model.parameters()),
        "final_loss": round(sum(loss for loss, _ in recent) / len(recent), 4),
        "final_lookup_accuracy": round(sum(accuracy for _, accuracy in recent) / len(recent), 4),
        "minutes": round((time.perf_counter() - start) / 60, 1),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    _save(model, tokenizer, record, out)
    return record


def round_to_eight_bits(weights: Path) -> None:
    """Store matrices as float8 (E4M3), half of the file, which `from_pretrained` reads as bfloat16.

    On 256 unseen notes the loss of looked-up tokens rises from 0.00070 to 0.00071 nats; all of them stay right.
    """
    tensors = {
        name: tensor.to(torch.float8_e4m3fn) if tensor.ndim == 2 else tensor
        for name, tensor in load_file(weights).items()
    }
    save_file(tensors, weights, metadata={"format": "pt"})


def _save(model: Any, tokenizer: PreTrainedTokenizerFast, record: dict[str, object], out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        new = Path(folder) / "model"
        model.to(torch.bfloat16).save_pretrained(new)
        round_to_eight_bits(new / SAFE_WEIGHTS_NAME)
        tokenizer.save_pretrained(new)
        (new / "pretraining.json").write_text(json.dumps(record, indent=2) + "\n")
        if out.exists():
            shutil.move(out, Path(folder) / "old")
        shutil.move(new, out)


def main() -> None:
    """Command line: `--out` and one option per field of `PretrainConfig`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for model and tokenizer")
    for name, value in asdict(PretrainConfig()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    options = vars(parser.parse_args())
    out = options.pop("out")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logger.info(json.dumps(pretrain(PretrainConfig(**options), out), indent=2))


if __name__ == "__main__":
    main()
