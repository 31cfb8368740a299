"""Token Recall of finished runs: do their adapters find the tokens sensitive that an uncompressed run's adapter does?

    python recipes/benchmarks/token_recall.py runs/evaluation/main_fed_med/*/seed-0 --reference fedavg

Of each run's final adapter the squared gradient of the loss at the input embeddings is measured on the held-out rows,
per token id. The reference's `ceil(p n)` most sensitive of its n ids are compared with the method's own: 1.0 for the
reference itself, about p for a random order (`fedfstq_hf.metrics`, our definition; the paper has none).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from fedfstq_hf.cli.options import quieten
from fedfstq_hf.metrics.sensitive_tokens import DEFAULT_P, token_recall
from fedfstq_hf.recipe import Recipe
from fedfstq_hf.running.foundation import load_base
from fedfstq_hf.sensitivity import TokenSensitivity
from fedfstq_hf.workloads import Collator, load_workload


def main() -> None:
    """Read the options, measure each run, print and write the recalls."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders of one method and seed each")
    parser.add_argument("--reference", default="fedavg", help="the uncompressed method")
    parser.add_argument("--p", type=float, default=DEFAULT_P, help="share of the reference's ids that count")
    parser.add_argument("--rows", type=int, default=64, help="held-out rows to measure on")
    parser.add_argument("--model", help="base model, where it lies elsewhere than the recipe says")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    quieten()
    scores: dict[tuple[str, int], Tensor] = {}
    for folder in options.runs:
        recipe = Recipe.from_dict(json.loads((folder / "recipe.json").read_text()), str(folder))
        scores[next(iter(recipe.methods)), recipe.seeds[0]] = sensitivities(folder, recipe, options)
    found: dict[str, dict[int, float]] = {}
    for (method, seed), own in scores.items():
        if (options.reference, seed) in scores:
            recall = token_recall(scores[options.reference, seed], sensitivities=own, p=options.p)
            found.setdefault(method, {})[seed] = recall
    for method, by_seed in found.items():
        print(f"{method:>16}  " + "  ".join(f"seed {seed}: {recall:.3f}" for seed, recall in by_seed.items()))
    if options.out:
        facts: dict[str, Any] = {"p": options.p, "rows": options.rows, "reference": options.reference}
        options.out.write_text(json.dumps({**facts, "token_recall": found}, indent=1) + "\n")


def sensitivities(folder: Path, recipe: Recipe, options: argparse.Namespace) -> Tensor:
    """(vocab_size,) mean `||dL/de||^2` of each id's occurrences in the held-out rows; +inf for ids not met."""
    base, tokenizer = load_base(options.model or recipe.model, recipe.dtype)
    model = PeftModel.from_pretrained(base, folder / "adapter").eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    embedding = model.get_input_embeddings()
    table = TokenSensitivity(embedding.num_embeddings, rho=0.0)
    rows = load_workload(recipe.data, tokenizer).test[: options.rows]
    batch = Collator(tokenizer.pad_token_id)(rows)
    gradients = torch.zeros(batch["input_ids"].shape)
    for number in range(len(rows)):
        part = {name: value[number : number + 1] for name, value in batch.items()}
        embedded = embedding(part["input_ids"]).detach().requires_grad_(True)
        loss = model(inputs_embeds=embedded, attention_mask=part["attention_mask"], labels=part["labels"]).loss
        (gradient,) = torch.autograd.grad(loss, embedded)
        gradients[number] = gradient.float().square().sum(-1)[0]
    table.update(batch["input_ids"], gradients, batch["attention_mask"].bool())
    return table.scores()


if __name__ == "__main__":
    main()
