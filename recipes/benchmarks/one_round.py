"""What one round's messages do to the loss, by codec and server step, from the very same local updates.

Run: `python recipes/benchmarks/one_round.py [RECIPE] --rounds 2,5,9 [--KEY VALUE ...]`, by default on validation rows
of `evaluation/main_fed_code`, whose `fedavg` makes the way to those rounds. Prints and, with --json FILE, writes

- the change of the loss at each server step: negative is better, and what fp32 changes is the reference
- cosine: between the mean of the messages and the mean of the updates
- length: of the mean of the messages, relative to that of the updates along which it goes (1 / cosine at the best)
- noise: what the error of that mean costs beside its direction, at server step 1: the mean over error and its negative

One round says nothing about what adds up over rounds: a part that is left out each time, or noise.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from fedfstq_hf.cli.options import parse_overrides, quieten
from fedfstq_hf.codec import CodecContext, get_codec, parse_budget
from fedfstq_hf.federation.client.participation import Assignment, LocalResult
from fedfstq_hf.recipe import Recipe, load_recipe
from fedfstq_hf.running.evaluate import Evaluator
from fedfstq_hf.running.foundation import Founding
from fedfstq_hf.simulation import runner
from fedfstq_hf.simulation.simulated_participation import SimulatedParticipation
from fedfstq_hf.workloads import load_workload

CODECS = (
    "fp32",
    "fstq@0.05bpp",
    "fstq@0.1bpp",
    "fstq@0.3bpp",
    "fstq:fisher_weighted=false@0.1bpp",
    "topk:value_bits=8@0.3bpp",
)
STEPS = (0.7, 1.0, 1.4, 2.0)


def mean_of_messages(spec: str, results: Sequence[LocalResult], base: Tensor, founding: Founding) -> Tensor:
    """Weighted mean of what a codec, `NAME[:OPTION=VALUE...][@BUDGET]`, makes of a round's updates; (num_params,)."""
    name, _, budget = spec.partition("@")
    name, *settings = name.split(":")
    options = {key: yaml.safe_load(value) for key, _, value in (setting.partition("=") for setting in settings)}
    codec, schema = get_codec(name, **options), founding.view.schema
    max_bytes = parse_budget(budget, schema.num_params) if budget else None
    mean, total = torch.zeros(schema.num_params, dtype=torch.float64), 0
    for result in results:
        encoded = codec.encode(
            schema.unflatten(result.adapter - base),
            None if result.fisher is None else schema.unflatten(result.fisher),
            max_bytes=max_bytes,
            context=CodecContext(round=0),
        )
        encoded.reconstruction.add_to(mean, result.num_examples)
        total += result.num_examples
    return (mean / total).float()


def comparer(
    recipe: Recipe, founding: Founding, options: argparse.Namespace, found: list[dict[str, Any]]
) -> type[SimulatedParticipation]:
    """A participation that compares the codecs whenever the last client of a kept round has trained."""
    workload = load_workload(recipe.data, founding.tokenizer, held_out=recipe.evaluation.split)
    evaluator = Evaluator(
        workload.test, founding.tokenizer.pad_token_id, recipe.evaluation.batch_size, bf16=recipe.training.bf16
    )

    def loss_at(adapter: Tensor) -> float:
        founding.view.write(adapter)
        return evaluator(founding.model)["eval_loss"]

    def compare(round: int, base: Tensor, results: Sequence[LocalResult]) -> None:
        before, reference = loss_at(base), mean_of_messages("fp32", results, base, founding)
        alike = [float(torch.cosine_similarity(result.adapter - base, reference, dim=0)) for result in results]
        exact = loss_at(base + reference)
        print(
            f"round {round}, loss before {before:.4f}; cosine of a client's update and their mean "
            f"{sum(alike) / len(alike):.2f}; change at server step {', '.join(map(str, options.steps))}"
        )
        for spec in options.codecs:
            mean = mean_of_messages(spec, results, base, founding)
            changes = [round_(loss_at(base + step * mean) - before) for step in options.steps]
            along = float(mean @ reference / reference.square().sum())
            off = [loss_at(base + reference + sign * (mean - reference)) for sign in (1, -1)]
            row = {
                "round": round,
                "codec": spec,
                "change": changes,
                "cosine": round_(float(torch.cosine_similarity(mean, reference, dim=0))),
                "length": round_(float(mean.norm() / reference.norm()) / along),
                "noise": round_(sum(off) / 2 - exact),
            }
            found.append(row)
            print(
                f"  {spec:26} {'  '.join(f'{x:+.4f}' for x in changes)}   cosine {row['cosine']:.2f}  "
                f"length {row['length']:.2f}  noise {row['noise']:+.4f}",
                flush=True,
            )

    class Comparer(SimulatedParticipation):
        results: list[LocalResult]

        def complete(self, assignment: Assignment, result: LocalResult) -> dict[str, float]:
            metrics = super().complete(assignment, result)
            if assignment.round + 1 in options.rounds:
                self.results = [*getattr(self, "results", []), result]
                if len(self.results) == len(self._plan[assignment.round].survivors):
                    compare(assignment.round + 1, assignment.adapter, self.results)
                    self.results = []
            return metrics

    return Comparer


def round_(value: float) -> float:
    """Four decimals."""
    return round(value, 4)


def main() -> None:
    """Run `fedavg` of the recipe up to the last kept round and compare at each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="evaluation/main_fed_code")
    parser.add_argument("--rounds", default="2,5", help="rounds to compare at, counted from 1")
    parser.add_argument(
        "--codecs", default=",".join(CODECS), help="NAME[:OPTION=VALUE...][@BUDGET], separated by commas"
    )
    parser.add_argument("--steps", default=",".join(map(str, STEPS)), help="server steps")
    parser.add_argument("--json", type=Path, help="write the figures there")
    options, rest = parser.parse_known_args()
    options.rounds = sorted({int(r) for r in options.rounds.split(",")})
    options.codecs = options.codecs.split(",")
    options.steps = [float(step) for step in options.steps.split(",")]
    overrides = {"methods": "fedavg", "rounds": str(options.rounds[-1]), "evaluation.split": "validation"}
    recipe = load_recipe(options.recipe, overrides | parse_overrides(rest))
    quieten()
    found: list[dict[str, Any]] = []
    original = runner.found

    def found_and_compare(*args: Any, **kwargs: Any) -> Founding:
        founding = original(*args, **kwargs)
        runner.SimulatedParticipation = comparer(recipe, founding, options, found)  # type: ignore[misc, attr-defined]
        return founding

    runner.found = found_and_compare  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as folder:
        runner.Simulation(recipe, f"{folder}/run").run()
    if options.json:
        facts = {"command": " ".join(["python", *sys.argv]), "steps": options.steps, "rows": found}
        options.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
