"""Record what a federation's encoder gets: local updates, its Fisher information, and a Fisher of other batches.

Run: `python recipes/benchmarks/record_deltas.py --out FOLDER [RECIPE] [--keep 0,3,5] [--KEY VALUE ...]`, by default on
the embedded demo; as long as a simulation of one method until the last kept round takes. Writes, per client and kept
round, `FOLDER/round-R-client-NNNN.safetensors` with four flat float32 vectors in schema order, and
`FOLDER/recording.json` with names and shapes:

- `delta`: what local training changed
- `update`: what was encoded, `delta` plus the residual of earlier rounds
- `fisher`: the encoder's weights, an average along the local steps
- `other_fisher`: mean squared gradient of batches of held-out examples, at the end of local training
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fedfstq_hf.adapter import AdapterView
from fedfstq_hf.cli.options import parse_overrides, quieten
from fedfstq_hf.federation.client.participation import Assignment, LocalResult
from fedfstq_hf.recipe import load_recipe
from fedfstq_hf.running.foundation import Founding
from fedfstq_hf.simulation import runner
from fedfstq_hf.simulation.simulated_participation import SimulatedParticipation
from fedfstq_hf.workloads import Collator, load_workload

MANIFEST = "recording.json"


def other_fisher(view: AdapterView, batches: Sequence[dict[str, Tensor]]) -> Tensor:
    """Mean over batches of the squared gradient of the loss, (num_params,) float32, at the adapter as it stands."""
    model, total = view.model, torch.zeros(view.schema.num_params)
    was_training = model.training
    model.eval()
    with torch.enable_grad():
        for batch in batches:
            gradients = torch.autograd.grad(model(**batch).loss, view.parameters)
            total += torch.cat([g.reshape(-1) for g in gradients]).square().cpu()
    model.train(was_training)
    return total / len(batches)


def recorder(recipe: Any, founding: Founding, kept: Sequence[int], out: Path) -> type[SimulatedParticipation]:
    """A participation that writes down every update of the kept rounds."""
    training = recipe.training
    examples = load_workload(recipe.data, founding.tokenizer).test
    size, count = training.per_device_train_batch_size, training.local_steps
    collator = Collator(founding.tokenizer.pad_token_id)
    # an even sample over the held-out examples, as many batches as there are local steps
    step = max(1, len(examples) // (size * count))
    sample = [examples[i] for i in range(0, len(examples), step)][: size * count]
    batches = [collator(sample[i : i + size]) for i in range(0, len(sample), size)]

    class Recorder(SimulatedParticipation):
        def complete(self, assignment: Assignment, result: LocalResult) -> dict[str, float]:
            metrics = super().complete(assignment, result)
            pending = assignment.session.pending
            if assignment.round in kept and pending is not None:
                tensors = {
                    "delta": result.adapter - assignment.adapter,
                    "update": pending.corrected.clone(),
                    "fisher": result.fisher,
                    "other_fisher": other_fisher(founding.view, batches),
                }
                save_file(tensors, out / f"round-{assignment.round}-{assignment.session.client_id}.safetensors")
            return metrics

    return Recorder


def main() -> None:
    """Run one method of a recipe and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="quickstart")
    parser.add_argument("--out", type=Path, required=True, help="folder for the recordings")
    parser.add_argument("--keep", default="0,3,5", help="rounds to record")
    parser.add_argument("--method", default="fstq", help="method of the recipe whose federation is recorded")
    known, rest = parser.parse_known_args()
    kept = sorted({int(r) for r in known.keep.split(",")})
    overrides = {"methods": known.method, "rounds": str(kept[-1] + 1), "target.of": known.method}
    recipe = load_recipe(known.recipe, overrides | parse_overrides(rest))
    quieten()
    known.out.mkdir(parents=True, exist_ok=True)
    found = runner.found

    def found_and_record(*args: Any, **kwargs: Any) -> Founding:
        founding = found(*args, **kwargs)
        schema = founding.view.schema
        manifest = {
            "recipe": recipe.name,
            "method": known.method,
            "rounds": kept,
            "num_params": schema.num_params,
            "tensors": [[spec.name, list(spec.shape)] for spec in schema.tensors],
        }
        (known.out / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        runner.SimulatedParticipation = recorder(recipe, founding, kept, known.out)  # type: ignore[misc]
        return founding

    runner.found = found_and_record  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as folder:
        runner.Simulation(recipe, f"{folder}/run").run()
    print(f"{len(list(known.out.glob('round-*.safetensors')))} updates in {known.out}")


if __name__ == "__main__":
    main()
