"""Quality and speed of token-reduced generation, for every scorer and for dense; results in recipes/results.

Prerequisites: the installed package; 2 CPU cores and minutes, or a CUDA device (which then takes a larger shape). Run:

    OMP_NUM_THREADS=2 python recipes/benchmarks/generate.py speed --prompts 2048 --seconds 240
    OMP_NUM_THREADS=2 python recipes/benchmarks/generate.py speed --prompts 2048 --scorers all
    OMP_NUM_THREADS=2 python recipes/benchmarks/generate.py quality --task demo
    python recipes/benchmarks/generate.py show          # table and plots of all results so far

Each run replaces the rows it measured and leaves the others. Not covered: batches, quantised models.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import torch

KEYS = ("shape", "device", "clock", "threads", "prompt", "variant")
RESULTS = Path(__file__).parents[1] / "results"


def merge(name: str, rows: list[dict[str, Any]], keys: tuple[str, ...]) -> None:
    """Write rows into a result file, in place of those with the same keys."""
    path = RESULTS / name
    old = json.loads(path.read_text())["rows"] if path.exists() else []
    fresh = {tuple(str(row.get(key)) for key in keys) for row in rows}
    kept = [row for row in old if tuple(str(row.get(key)) for key in keys) not in fresh]
    command = f"OMP_NUM_THREADS={torch.get_num_threads()} python recipes/benchmarks/generate.py {' '.join(_told())}"
    rows = [*kept, *({**row, "command": command} for row in rows)]
    rows.sort(key=lambda row: [str(row.get(key)).zfill(8) for key in keys])
    text = ",\n".join("    " + json.dumps(row) for row in rows)
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    path.write_text(
        f'{{\n  "machine": {json.dumps(machine)},\n  "torch": "{torch.__version__}",\n  "rows": [\n{text}\n  ]\n}}\n'
    )


def speed(args: argparse.Namespace) -> None:
    """Measure prompt after prompt; results are written after every round."""
    from generate_speed import make_model, measure, set_clock

    set_clock(args.clock)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = args.shape or ("1B" if device == "cuda" else "100M")
    model = make_model(shape, device)
    common = {"shape": shape, "device": device, "clock": args.clock, "threads": torch.get_num_threads()}
    common["new_tokens"] = args.new_tokens
    for length in args.prompts:
        rows: list[dict[str, Any]] = []
        for rows in measure(model, length, args.scorers, args.ratios, args.new_tokens, args.seconds, args.rounds):
            merge("generate_speed.json", [common | row for row in rows], KEYS)
        for row in rows:
            print(
                f"{length:5d} {row['variant']:20s} first token {row['first_token_speedup']:.2f}x, end to end "
                f"{row['end_to_end_speedup']:.2f}x ({row['rounds']} rounds, {row['peak_megabytes']} MB)",
                flush=True,
            )


def quality(args: argparse.Namespace) -> None:
    """Measure one task at every ratio for every scorer."""
    from generate_quality import measure

    for rows in measure(args.task, args.examples, args.ratios, args.seeds, args.lab_model, args.data, args.work):
        merge("generate_quality.json", rows, ("task", "scorer", "keep_ratio"))


def show(args: argparse.Namespace) -> None:
    """Tables to the terminal, plots to docs/images."""
    from generate_plots import draw, tables

    results = {
        part: json.loads(path.read_text())["rows"]
        for part in ("speed", "quality")
        if (path := RESULTS / f"generate_{part}.json").exists()
    }
    print(tables(results))
    for path in draw(results, Path(__file__).parents[2] / "docs" / "images"):
        print(path)


def _told() -> list[str]:
    """The arguments as anyone would type them: without the folder that trained adapters were kept in."""
    given = sys.argv[1:]
    at = given.index("--work") if "--work" in given else len(given)
    return given[:at] + given[at + 2 :]


def main() -> None:
    """Parse and run one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)

    def numbers(text: str) -> list[float]:
        return [float(number) for number in text.split(",")]

    one = parts.add_parser("speed")
    one.add_argument("--prompts", type=lambda text: [int(n) for n in text.split(",")], default=[64, 256, 1024, 2048])
    one.add_argument("--scorers", choices=("default", "all"), default="default")
    one.add_argument("--ratios", type=numbers, default=[0.75, 0.5, 0.33, 0.25], help="of the default scorer")
    one.add_argument("--shape", help="default: 100M on the CPU, 1B on CUDA")
    one.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: CPU time, with OMP_NUM_THREADS=1")
    one.add_argument("--new-tokens", type=int, default=32)
    one.add_argument("--rounds", type=int, default=3, help="at least so many")
    one.add_argument("--seconds", type=float, default=60, help="per prompt length")
    two = parts.add_parser("quality")
    two.add_argument("--task", choices=("demo", "fed_med", "fed_aya"), default="demo")
    two.add_argument("--examples", type=int, default=300)
    two.add_argument("--ratios", type=numbers, default=[0.75, 0.5, 0.33, 0.25])
    two.add_argument("--seeds", type=int, default=3, help="adapters trained with as many seeds")
    two.add_argument("--lab-model", default="../shared/models/lab-llama-6m", help="base of fed_med and fed_aya")
    two.add_argument("--data", default="../shared/data", help="folder with their data")
    two.add_argument("--work", default="/tmp/fedfstq_generate", help="folder for trained adapters, used again")
    parts.add_parser("show")
    args = parser.parse_args()
    {"speed": speed, "quality": quality, "show": show}[args.part](args)


if __name__ == "__main__":
    main()
