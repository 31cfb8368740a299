"""Quality of token-reduced generation: exact match on the demo task, answer loss on the lab model's tasks.

Part of `generate.py`. Each seed trains its own LoRA adapter on pooled data, and with it token table and probe at every
fifth step, as a client's refresh steps do. Adapters are kept in a work folder and used again. Prompts are shorter
than `min_tokens` would let through on the demo task, so reduction is forced there (`min_tokens=0`).
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from demo_lora import Row, collate, encode
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedfstq_hf.demo import make_examples, model_path
from fedfstq_hf.generation.probe import Probe, ProbeFit
from fedfstq_hf.generation.reducer import TokenReducer
from fedfstq_hf.generation.scorers import Combined, QueryAttention, Random, Rarity, Recency, Scorer, TokenTable
from fedfstq_hf.sensitivity import TokenSensitivity

LAYER, REFRESH = 2, 5
TEST_SEED = 11  # of the demo's notes; the default scorer was chosen on those of seed 5


@dataclass(frozen=True)
class Task:
    """Rows of token ids with labels (-100 on the prompt), and how to train on them."""

    base: str
    train: list[Row]
    test: list[Row]
    steps: int
    batch_size: int
    learning_rate: float


def load_task(name: str, examples: int, seed: int, lab_model: str, data: str) -> Task:
    """The demo task, or one of the lab model's with prompts of at most 448 and answers of at most 32 tokens."""
    if name == "demo":
        tokenizer = AutoTokenizer.from_pretrained(model_path())
        train = encode(tokenizer, make_examples(4000, seed, "train"))
        test = encode(tokenizer, make_examples(examples, TEST_SEED, "test"))
        return Task(str(model_path()), train, test, 200, 8, 3e-3)
    tokenizer = AutoTokenizer.from_pretrained(lab_model)
    lines = (Path(data) / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    parts: dict[str, list[Row]] = {"train": [], "test": []}
    for line in random.Random(0).sample(lines, len(lines)):
        row = json.loads(line)
        part = parts[row["split"]]
        if len(part) < (examples if row["split"] == "test" else 600):
            encoded = _lab_row(tokenizer, name, row)
            if sum(label == -100 for label in encoded[1]) >= 128:
                part.append(encoded)
    return Task(lab_model, parts["train"], parts["test"], 80, 4, 5e-4)


def _lab_row(tokenizer: Any, name: str, row: dict[str, Any]) -> Row:
    if name == "fed_med":
        asked = tokenizer(f"\nQuestion: {row['question']}\nAnswer:", add_special_tokens=False)["input_ids"]
        read, answer = row["context"], " " + row["long_answer"]
    else:
        asked, read, answer = [], row["prompt"], "\n" + row["answer"]
    given = tokenizer(read, add_special_tokens=False)["input_ids"][: 448 - len(asked)] + asked
    said = tokenizer(answer, add_special_tokens=False)["input_ids"][:32]
    return given + said, [-100] * len(given) + said


def train(task: Task, seed: int, folder: Path) -> tuple[Any, TokenTable, Probe]:
    """A merged model with what its training learned of tokens; from the folder if it was trained before."""
    base = AutoModelForCausalLM.from_pretrained(task.base, dtype=torch.float32)
    if not (folder / "saliency.pt").exists():
        _train(base, task, seed, folder)
        base = AutoModelForCausalLM.from_pretrained(task.base, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(folder)).merge_and_unload().eval()
    learned = torch.load(folder / "saliency.pt")
    return model, TokenTable(learned["table"]), Probe(learned["weight"], learned["bias"], LAYER)


def _train(base: Any, task: Task, seed: int, folder: Path) -> None:
    torch.manual_seed(seed)
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=task.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - 0.9 * step / task.steps)
    embedding, block = model.get_input_embeddings(), model.get_base_model().model.layers[LAYER]
    table, fit = TokenSensitivity(embedding.weight.shape[0]), ProbeFit(embedding.weight.shape[1], LAYER)
    order, seen = random.Random(seed), {}

    def watch_embedding(module: Any, given: Any, output: torch.Tensor) -> torch.Tensor:
        seen["embedded"] = output.requires_grad_(True)
        seen["embedded"].retain_grad()
        return seen["embedded"]

    for step in range(1, task.steps + 1):
        ids, labels = collate(order.sample(task.train, task.batch_size), 0)
        handles = []
        if step % REFRESH == 0:
            handles.append(embedding.register_forward_hook(watch_embedding))
            handles.append(block.register_forward_pre_hook(lambda _, args: seen.update(hidden=args[0].detach())))
        model(input_ids=ids, labels=labels).loss.backward()
        for handle in handles:
            handle.remove()
        if handles:
            g, real = seen["embedded"].grad.double().pow(2).sum(-1), ids != 0
            table.update(ids, g, real)
            fit.update(seen["hidden"], g, real)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.save_pretrained(str(folder))
    probe = fit.solve()
    torch.save({"table": table.scores(), "weight": probe.weight, "bias": probe.bias}, folder / "saliency.pt")


def exact_match(model: Any, rows: list[Row], **options: Any) -> float:
    """Share of rows whose greedy answer, up to the end token, is the right one. Left-padded batches of 20."""
    hits = 0
    for start in range(0, len(rows), 20):
        part = rows[start : start + 20]
        prompts = [[i for i, label in zip(*row, strict=True) if label == -100] for row in part]
        answers = [[label for label in row[1] if label != -100] for row in part]
        longest, most = max(map(len, prompts)), max(map(len, answers))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        result = model.generate(ids, attention_mask=(ids != 0).long(), max_new_tokens=most, do_sample=False, **options)
        found = result[:, longest:].tolist()
        hits += sum(own[: len(answer)] == answer for own, answer in zip(found, answers, strict=True))
    return hits / len(rows)


def answer_loss(model: Any, rows: list[Row], **options: Any) -> float:
    """Nats per token of the reference answers, fed step by step after the (shortened) prompt."""
    total, tokens = 0.0, 0
    for ids, labels in rows:
        prompt = torch.tensor([[i for i, label in zip(ids, labels, strict=True) if label == -100]])
        answer = [label for label in labels if label != -100]
        result = model.generate(
            prompt,
            max_new_tokens=len(answer),
            do_sample=False,
            prefix_allowed_tokens_fn=lambda _, so_far, prompt=prompt, answer=answer: [
                answer[min(len(so_far) - prompt.shape[1], len(answer) - 1)]
            ],
            output_logits=True,
            return_dict_in_generate=True,
            **options,
        )
        logits = torch.stack(result.logits, dim=1)[0].float()
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum").item()
        tokens += len(answer)
    return total / tokens


class Rerun:
    """A scorer's choice without its early-layer work: the kept tokens begin again at the first layer."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer

    def scores(self, model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """(B, T), those of the scorer."""
        return self.scorer.scores(model, input_ids, attention_mask)


def measure(
    name: str, examples: int, ratios: list[float], seeds: int, lab_model: str, data: str, work: str
) -> Iterator[list[dict[str, Any]]]:
    """Rows after each seed, with the metric of each seed so far; above 0.5 the default scorer only."""
    values: dict[tuple[str, float], list[float]] = {}
    score = exact_match if name == "demo" else answer_loss
    for seed in range(seeds):
        task = load_task(name, examples, seed, lab_model, data)
        model, table, probe = train(task, seed, Path(work) / name / str(seed))
        values.setdefault(("dense", 1.0), []).append(score(model, task.test))
        scorers: dict[str, Scorer] = {
            "default": QueryAttention(),
            "default, rerun": Rerun(QueryAttention()),
            "combined": Combined([QueryAttention(), table], [0.9, 0.1]),
            "table": table,
            "probe": probe,
            "random": Random(seed),
            "recency": Recency(),
            "rarity": Rarity(_counts(task, len(table.table))),
        }
        for ratio in ratios:
            for scorer_name, scorer in scorers.items():
                if ratio > 0.5 and scorer_name != "default":
                    continue
                reducer = TokenReducer(ratio, scorer=scorer, min_tokens=0)
                found = score(model, task.test, custom_generate=reducer)
                values.setdefault((scorer_name, ratio), []).append(found)
                print(f"{name} seed {seed} keep {ratio} {scorer_name}: {found:.3f}", flush=True)
        metric = "exact_match" if name == "demo" else "answer_loss"
        yield [
            {"task": name, "scorer": scorer, "keep_ratio": ratio, metric: [round(value, 4) for value in found]}
            | {"examples": examples}
            for (scorer, ratio), found in values.items()
        ]


def _counts(task: Task, vocab_size: int) -> torch.Tensor:
    ids = torch.tensor([i for row, _ in task.train[:500] for i in row])
    return torch.bincount(ids, minlength=vocab_size)
