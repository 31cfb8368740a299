"""Which Fisher information weighs a message best: its own choices side by side on the embedded demo.

    python recipes/benchmarks/fisher.py                     # some minutes on one CPU core
    python recipes/benchmarks/fisher.py --clients 1 --steps 10

One local round of `--steps` steps from the same start on the data of each of `--clients` clients. The choices are the
moving average of the gradients (`gradients`), Adam's second moments (`adam`), and the average of the filtered
objective's gradients while the optimizer sees the full one (`filtered-only`, objective `hard`, refreshed at every other
step). The reference is the mean squared gradient of held-out batches at the end of training. Reported per choice: rank
correlation with the reference, and the reference-weighted distortion of a message of `--budget` that the choice weighs,
as a share of what is lost by sending nothing. The delta is the same for all: that of `gradients`, without residual.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedfstq_hf import FedFSTQConfig, FedFSTQTrainer
from fedfstq_hf.adapter import AdapterView
from fedfstq_hf.cli.options import quieten
from fedfstq_hf.codec import CodecContext, get_codec, parse_budget
from fedfstq_hf.recipe import load_recipe
from fedfstq_hf.running.foundation import found, training_arguments
from fedfstq_hf.simulation.population import make_shards
from fedfstq_hf.workloads import Collator, load_workload

OUT = Path(__file__).parents[1] / "results" / "fisher.json"
CHOICES: dict[str, dict[str, Any]] = {
    "gradients": {},
    "adam": {"fisher": "adam"},
    "filtered-only": {"objective": "hard", "fisher_objective": "filtered-only", "refresh_steps": 2},
}


def reference(view: AdapterView, batches: list[dict[str, Tensor]]) -> Tensor:
    """Mean squared gradient over held-out batches, (num_params,) float32."""
    total = torch.zeros(view.schema.num_params)
    view.model.eval()
    for batch in batches:
        gradients = torch.autograd.grad(view.model(**batch).loss, view.parameters)
        total += torch.cat([g.reshape(-1) for g in gradients]).square()
    return total / len(batches)


def rank_correlation(one: Tensor, two: Tensor) -> float:
    """Spearman's, ties by position."""
    ranks = torch.stack([values.argsort().argsort().double() for values in (one, two)])
    return float(torch.corrcoef(ranks)[0, 1])


def main() -> None:
    """Train, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--budget", nargs="+", default=["0.1bpp", "0.3bpp"])
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    quieten()
    recipe = load_recipe("quickstart", {})
    founding = found(recipe, 0)
    view, workload = founding.view, load_workload(recipe.data, founding.tokenizer)
    shards = make_shards(
        workload.train, recipe.federation.clients, partition="dirichlet", alpha=recipe.federation.alpha, seed=0
    )
    collator = Collator(founding.tokenizer.pad_token_id)
    size = recipe.training.per_device_train_batch_size
    held_out = workload.test[: size * 20]
    batches = [collator(held_out[i : i + size]) for i in range(0, len(held_out), size)]
    start, codec = view.read(), get_codec("fstq")
    found_values: dict[str, dict[str, list[float]]] = {name: {} for name in CHOICES}
    for shard in shards[: options.clients]:
        fishers: dict[str, Tensor] = {}
        for name, settings in CHOICES.items():
            view.write(start)
            with tempfile.TemporaryDirectory() as folder:
                trainer = FedFSTQTrainer(
                    model=founding.model,
                    args=training_arguments(recipe, folder, seed=0, max_steps=options.steps),
                    train_dataset=[workload.train[i] for i in shard],
                    data_collator=collator,
                    federation=FedFSTQConfig(**settings),
                )
                trainer.train()
            fishers[name] = trainer.fisher_vector()
            if name == "gradients":
                delta, truth = view.read() - start, reference(view, batches)
        for name, fisher in fishers.items():
            values = found_values[name]
            values.setdefault("rank_correlation", []).append(rank_correlation(fisher, truth))
            for budget in options.budget:
                payload = codec.encode(
                    view.schema.unflatten(delta),
                    view.schema.unflatten(fisher),
                    max_bytes=parse_budget(budget, view.schema.num_params),
                    context=CodecContext(round=0),
                ).payload
                lost = delta - codec.decode(payload, view.schema, CodecContext(round=0)).to_dense()
                share = float((truth * lost.square()).sum() / (truth * delta.square()).sum())
                values.setdefault(f"distortion at {budget}", []).append(share)
    means = {
        name: {key: round(sum(v) / len(v), 4) for key, v in values.items()} for name, values in found_values.items()
    }
    print(json.dumps(means, indent=1))
    results = {"clients": options.clients, "steps": options.steps, "recipe": "quickstart", "mean": means}
    options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
