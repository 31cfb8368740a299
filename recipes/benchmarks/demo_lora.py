"""Exact match of the embedded demo's base model on held-out notes, before and after plain LoRA on pooled data.

Needs nothing but the installed package; 2 CPU cores and some minutes. Run:

    python recipes/benchmarks/demo_lora.py
    python recipes/benchmarks/demo_lora.py --steps 800 --lr 2e-3      # override any setting

Exits with 1 when the adapted model stays below `--bar` (0.95). Not covered: anything federated.
"""

import argparse
import random
import sys
import time
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model

from fedfstq_hf.demo import load_model, load_tokenizer, make_examples

Row = tuple[list[int], list[int]]  # input ids and labels, -100 on the prompt


def encode(tokenizer: Any, examples: list[dict[str, str]]) -> list[Row]:
    """Prompt and answer tokenised apart and joined, then the end-of-text token."""
    rows = []
    for example in examples:
        prompt = tokenizer(example["prompt"], add_special_tokens=False)["input_ids"]
        answer = [*tokenizer(example["answer"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        rows.append((prompt + answer, [-100] * len(prompt) + answer))
    return rows


def collate(rows: list[Row], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids and labels, both (B, T) int64: causal attention needs no mask then."""
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in rows])
    return ids, torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in rows])


@torch.no_grad()
def exact_match(model: Any, rows: list[Row], pad: int, end: int) -> tuple[float, float, float]:
    """Exact match, the same without asking for the end token, and mean loss per answer token.

    All answer tokens are the most likely ones under teacher forcing just when greedy decoding gives that answer.
    """
    model.eval()
    hits = words = tokens = 0
    loss = 0.0
    ordered = sorted(rows, key=lambda row: len(row[0]))
    for start in range(0, len(ordered), 25):
        ids, labels = collate(ordered[start : start + 25], pad)
        logits, labels = model(input_ids=ids).logits[:, :-1], labels[:, 1:]
        asked = labels != -100
        right = (logits.argmax(-1) == labels) | ~asked
        hits += int(right.all(1).sum())
        words += int((right | (labels == end)).all(1).sum())
        loss += F.cross_entropy(logits[asked], labels[asked], reduction="sum").item()
        tokens += int(asked.sum())
    model.train()
    return hits / len(rows), words / len(rows), loss / tokens


def main() -> int:
    """Print exact match of the base and along the training; 0 if the bar is reached."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--alpha", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--train", type=int, default=4000, help="pooled training examples")
    parser.add_argument("--test", type=int, default=400, help="held-out examples")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bar", type=float, default=0.95)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    tokenizer = load_tokenizer()
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    train = encode(tokenizer, make_examples(args.train, args.seed, "train"))
    test = encode(tokenizer, make_examples(args.test, args.seed, "test"))
    model = load_model()
    score, without_end, loss = exact_match(model, test, pad, end)
    print(f"base: exact match {score:.3f} (without the end token {without_end:.3f}), loss {loss:.3f}")

    model = get_peft_model(
        model, LoraConfig(r=args.rank, lora_alpha=args.alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - 0.9 * step / args.steps)
    order, start, busy = random.Random(args.seed), time.perf_counter(), 0.0
    for step in range(1, args.steps + 1):
        before = time.perf_counter()
        ids, labels = collate(order.sample(train, args.batch_size), pad)
        model(input_ids=ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        busy += time.perf_counter() - before
        if step % 100 == 0 or step == args.steps:
            score, _, loss = exact_match(model, test, pad, end)
            print(f"step {step}: exact match {score:.3f}, loss {loss:.3f}, {1000 * busy / step:.0f} ms per step")
    minutes = (time.perf_counter() - start) / 60
    count = sum(p.numel() for p in parameters)
    print(f"LoRA r={args.rank} ({count} parameters): exact match {score:.3f} after {minutes:.1f} minutes")
    return 0 if score >= args.bar else 1


if __name__ == "__main__":
    sys.exit(main())
