"""Make the demo's base model: tokenizer, then a small Llama trained to read notes and to write charts of them.

Run `python -m fedfstq_hf.demo.pretrain --out DIR`. The model learns to look facts up, but never sees the
question format of the federated task, nor a note of its train or test split.
"""

import argparse
import json
import logging
import math
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .notes import Note, belongs, make_examples, write_note
from .vocabulary import SPECIALTIES

logger = logging.getLogger(__name__)

PAD, BOS, EOS = "<pad>", "<s>", "</s>"

# A chart line is lead + key + tail + sign + value: the words between key and value are what makes the look-up robust.
LEADS = ("", "", "", "{kind} ", "{kind} of ")
TAILS = ("", "", "", " on file", " on this visit")
SIGNS = (":", " =", " ->", " is")


@dataclass(frozen=True)
class PretrainConfig:
    """Everything that decides the weights, besides the machine's own arithmetic."""

    seed: int = 0
    vocab_size: int = 1024
    hidden_size: int = 128
    layers: int = 3
    heads: int = 4
    intermediate_size: int = 320
    steps: int = 2500
    batch_size: int = 32
    learning_rate: float = 3e-3
    warmup: int = 100
    weight_decay: float = 0.05
    short_steps: int = 600  # notes grow over so many steps: look-up is learned on short ones first
    context_weight: float = 0.1  # loss weight of all tokens but the chart's values
    init: float = 0.06


def chart(rng: random.Random, note: Note) -> tuple[str, list[tuple[int, int]]]:
    """Facts of a note in random order, as `key: value` lines in one of many styles (one per chart, or one per line).

    Returns the text and the character spans of its values: the part that only a reader of the note can know.
    """
    facts = [("state", finding, status) for finding, status in note.findings.items()]
    for p in note.drugs:
        facts.append(("dose", p.drug, f"{p.dose} mg" if p.dose else "off"))
        if p.change != "kept":
            facts.append(("change", p.change, p.drug))
    facts += [("latest", measure, str(today)) for measure, (today, _) in note.measures.items()]
    rng.shuffle(facts)

    def style() -> tuple[str, str, str]:
        return rng.choice(LEADS), rng.choice(TAILS), rng.choice(SIGNS)

    shared = style() if rng.random() < 0.5 else None
    text, spans = "chart:", []
    for kind, key, value in facts:
        lead, tail, sign = shared or style()
        text += f" {lead.format(kind=kind)}{key}{tail}{sign}"
        spans.append((len(text), len(text) + 1 + len(value)))
        text += f" {value};"
    return text, spans


def documents(seed: int | str, richness: Callable[[int], float] = lambda _: 1.0) -> Iterator[tuple[str, list[tuple[int, int]]]]:
    """Endless (text, spans of the looked-up values) from notes reserved for pretraining; `richness` by their count."""
    rng, names, count = random.Random(f"pretrain/{seed}"), tuple(SPECIALTIES), 0
    while True:
        note = write_note(rng, rng.choice(names), richness(count))
        if belongs(note, "pretrain"):
            table, spans = chart(rng, note)
            head = f"note: {note.text}\n"
            yield head + table, [(start + len(head), end + len(head)) for start, end in spans]
            count += 1


def train_tokenizer(config: PretrainConfig) -> PreTrainedTokenizerFast:
    """Byte-level BPE, so no text has unknown tokens. Every text starts a new word: joined pieces tokenise cleanly."""
    stream = documents("tokenizer")
    texts = [next(stream)[0] for _ in range(4000)]
    texts += [f"question: {e['prompt'].split('question: ')[1]} {e['answer']}" for e in make_examples(4000, 1, "train")]
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
    growth = config.short_steps * config.batch_size
    sizes = random.Random(config.seed + 1)
    stream = documents(config.seed, lambda count: sizes.uniform(0.15, min(1.0, 0.15 + 0.85 * count / max(1, growth))))
    order = random.Random(config.seed)
    while True:
        texts, spans = zip(*(next(stream) for _ in range(8 * config.batch_size)), strict=True)
        encoded = tokenizer(list(texts), return_offsets_mapping=True)
        rows = []
        for ids, offsets, values in zip(encoded["input_ids"], encoded["offset_mapping"], spans, strict=True):
            inside = {position for start, end in values for position in range(start + 1, end + 1)}
            rows.append((ids, [1.0 if end in inside else config.context_weight for _, end in offsets]))
        rows.sort(key=lambda row: len(row[0]))
        pool = [rows[i : i + config.batch_size] for i in range(0, len(rows), config.batch_size)]
        order.shuffle(pool)
        for batch in pool:
            longest = max(len(ids) for ids, _ in batch)
            ids = torch.tensor([ids + [tokenizer.pad_token_id] * (longest - len(ids)) for ids, _ in batch])
            weights = torch.tensor([weight + [0.0] * (longest - len(weight)) for _, weight in batch])
            yield ids, weights


def weighted_loss(model: Any, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Mean next-token loss under `weights` (B, T). Padding lies on the right, so no attention mask is needed."""
    logits = model(input_ids=ids).logits[:, :-1]
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    weights = weights[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()


def pretrain(config: PretrainConfig, out: Path) -> dict[str, object]:
    """Train tokenizer and model and move them to `out` in one step; returns (and stores) a record of the run."""
    start = time.perf_counter()
    torch.manual_seed(config.seed)
    tokenizer = train_tokenizer(config)
    model = LlamaForCausalLM(
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
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=config.weight_decay
    )

    def rate(step: int) -> float:
        if step < config.warmup:
            return (step + 1) / config.warmup
        done = (step - config.warmup) / max(1, config.steps - config.warmup)
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    recent: list[float] = []
    for step, (ids, weights) in zip(range(config.steps), batches(config, tokenizer), strict=False):
        loss = weighted_loss(model, ids, weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        recent = [*recent[-99:], loss.item()]
        if step % 100 == 99:
            logger.info("step %d, loss %.4f, %.0f s", step + 1, sum(recent) / len(recent), time.perf_counter() - start)

    record: dict[str, object] = {
        "command": f"python -m fedfstq_hf.demo.pretrain --out {out.name}",
        "config": asdict(config),
        "parameters": sum(p.numel() for p in model.parameters()),
        "final_loss": round(sum(recent) / len(recent), 4),
        "minutes": round((time.perf_counter() - start) / 60, 1),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    _save(model, tokenizer, record, out)
    return record


def _save(model: Any, tokenizer: PreTrainedTokenizerFast, record: dict[str, object], out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        new = Path(folder) / "model"
        model.to(torch.bfloat16).save_pretrained(new)
        tokenizer.save_pretrained(new)
        (new / "pretraining.json").write_text(json.dumps(record, indent=2) + "\n")
        if out.exists():
            shutil.move(out, Path(folder) / "old")
        shutil.move(new, out)


def main() -> None:
    """Command line: `--out` and one option per field of `PretrainConfig`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write; replaced when it exists")
    for name, value in asdict(PretrainConfig()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    options = vars(parser.parse_args())
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    out = options.pop("out")
    logger.info("%s", json.dumps(pretrain(PretrainConfig(**options), out), indent=2))


if __name__ == "__main__":
    main()
