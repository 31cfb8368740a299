"""How much of a simulation's wall clock is not forward pass, backward pass or optimizer step.

Run: `python recipes/benchmarks/overhead.py [RECIPE] [--KEY VALUE ...]` (default: quickstart; as long as that takes).
Prints seconds per part and the overhead's share. Codec, Fisher averages, data loading, Trainer's own bookkeeping, files
and aggregation are overhead; importing libraries and loading the model are not counted.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator

from fedfstq_hf.cli.options import parse_overrides, quieten
from fedfstq_hf.recipe import load_recipe
from fedfstq_hf.simulation import runner
from fedfstq_hf.trainer.trainer import FedFSTQTrainer

seconds: dict[str, float] = defaultdict(float)


def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, with its seconds added to those of `part`."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[part] += time.perf_counter() - started

    return wrapper


def main() -> None:
    """Run the simulation with its parts timed."""
    arguments = sys.argv[1:]
    name = arguments.pop(0) if arguments and not arguments[0].startswith("--") else "quickstart"
    recipe = load_recipe(name, parse_overrides(arguments))
    quieten()
    FedFSTQTrainer.compute_loss = timed("forward", FedFSTQTrainer.compute_loss)  # type: ignore[method-assign]
    Accelerator.backward = timed("backward", Accelerator.backward)  # type: ignore[method-assign]
    runner.Evaluator.__call__ = timed("evaluation forward", runner.Evaluator.__call__)  # type: ignore[method-assign]
    runner.found = timed("loading", runner.found)  # type: ignore[attr-defined]
    for optimizer in (torch.optim.AdamW, torch.optim.SGD):
        optimizer.step = timed("optimizer", optimizer.step)  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        simulation = runner.Simulation(recipe, f"{folder}/run")
        started = time.perf_counter()
        simulation.run()
        total = time.perf_counter() - started - seconds.pop("loading")
    overhead = total - sum(seconds.values())
    for part, spent in seconds.items():
        print(f"{part:<20} {spent:8.1f} s")
    print(f"{'overhead':<20} {overhead:8.1f} s = {100 * overhead / total:.1f} % of {total:.1f} s")


if __name__ == "__main__":
    main()
