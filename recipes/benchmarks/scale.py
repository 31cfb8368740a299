"""What a client's round costs in `simulate` as the federation grows: CPU seconds with 10, 100 and 1000 clients.

    OMP_NUM_THREADS=1 python recipes/benchmarks/scale.py --out recipes/results/scale.json

The embedded demo, `fstq`, 4 clients a round, trained one after the other in this process. A run of few rounds is taken
off one of more, which leaves what further rounds cost (training, coding, aggregation, bookkeeping and the evaluation of
8 rows); the rest is the start. CPU time, so that other work on the machine enters little.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from fedfstq_hf.cli.options import quieten
from fedfstq_hf.recipe import load_recipe
from fedfstq_hf.simulation.runner import Simulation

SHORT, LONG, PER_ROUND = 2, 10, 4


def main() -> None:
    """Read the options, run each size, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    quieten()
    run(min(options.clients), SHORT)  # imports and caches
    results: dict[str, dict[str, list[float]]] = {}
    for _ in range(options.repeats):
        for clients in options.clients:
            short, long = run(clients, SHORT), run(clients, LONG)
            marginal = (long - short) / ((LONG - SHORT) * PER_ROUND)
            found = results.setdefault(str(clients), {"client_round_cpu_s": [], "start_cpu_s": []})
            found["client_round_cpu_s"].append(round(marginal, 4))
            found["start_cpu_s"].append(round(short - SHORT * PER_ROUND * marginal, 2))
            print(f"{clients:>6} clients: {marginal:.3f} CPU s a client-round, start {found['start_cpu_s'][-1]} CPU s")
    if options.out:
        facts = {"command": " ".join(["python", *sys.argv]), "cores": os.cpu_count(), "results": results}
        options.out.write_text(json.dumps(facts, indent=1) + "\n")


def run(clients: int, rounds: int) -> float:
    """CPU seconds of a whole run."""
    recipe = load_recipe(
        "quickstart",
        {
            "clients": clients,
            "clients_per_round": PER_ROUND,
            "rounds": rounds,
            "methods": "fstq",
            "local_steps": 2,
            "federation.min_examples": 1,
            "data.test_limit": 8,
        },
    )
    with tempfile.TemporaryDirectory() as folder:
        started = time.process_time()
        Simulation(recipe, Path(folder) / "run", progress=False).run()
        return time.process_time() - started


if __name__ == "__main__":
    main()
