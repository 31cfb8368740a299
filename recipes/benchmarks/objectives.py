"""What each token-filtered objective costs and gains: tables and a plot of runs of `evaluation/objectives_fed_*`.

    OMP_NUM_THREADS=1 fedfstq simulate evaluation/objectives_fed_med --seeds 3 --out runs/med     # likewise aya, code
    python recipes/benchmarks/objectives.py runs/med runs/aya runs/code

Reads each run's `metrics.jsonl` and writes `recipes/results/objectives.json` and `docs/images/objectives.png`: held-out
loss by local steps, by seconds of local training and by uplink bytes. Seeds of a method that were not run to the last
round are left out, and what is compared is compared on the same seeds. Seconds are
of a client's local training as the simulator timed it, in each method's fastest round, since other work on the machine
stretches the others; what a step costs on a quiet machine says step.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).parents[2]
OUT = ROOT / "recipes" / "results" / "objectives.json"
PLOT = ROOT / "docs" / "images" / "objectives.png"
COLORS = {
    "full": "#222222",
    "soft": "#999933",
    "unbiased-0.5": "#0077bb",
    "unbiased-0.25": "#33bbee",
    "hard-0.75": "#ee7733",
    "hard-0.5": "#cc3311",
}


def spread(values: list[float]) -> dict[str, float]:
    """Mean and sample standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": round(statistics.fmean(values), 4), "std": round(deviation, 4)}


def read(folder: Path) -> dict[str, Any]:
    """One workload: per method its curve over the seeds that every method has whole."""
    recipe = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rounds, steps = recipe["federation"]["rounds"], recipe["training"]["local_steps"]
    curves: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        curves.setdefault((row["method"], row["seed"]), []).append(row)
    whole = {key: rows for key, rows in curves.items() if rows[-1]["round"] == rounds}
    methods = [name for name in recipe["methods"] if any(method == name for method, _ in whole)]
    seeds = [s for s in recipe["seeds"] if all((method, s) in whole for method in methods)]
    found: dict[str, Any] = {}
    for method in methods:
        mine = [whole[method, seed] for seed in seeds]
        seconds = min(row["compute_seconds"] for run in mine for row in run[1:])
        found[method] = {
            "loss": [spread([run[r]["metric"] for run in mine]) for r in range(rounds + 1)],
            "minus_full": spread(
                [run[-1]["metric"] - whole["full", seed][-1]["metric"] for run, seed in zip(mine, seeds, strict=True)]
            ),
            "uplink_bytes": [
                round(statistics.fmean(run[r]["cumulative_uplink_bytes"] for run in mine)) for r in range(rounds + 1)
            ],
            "seconds_per_local_step": round(seconds / steps, 4),
        }
    for name in found:
        ratio = found[name]["seconds_per_local_step"] / found["full"]["seconds_per_local_step"]
        found[name]["seconds_by_full"] = round(ratio, 3)
    return {"recipe": recipe["name"], "seeds": seeds, "local_steps": steps, "rounds": rounds, "methods": found}


def table(workload: dict[str, Any]) -> str:
    """Markdown: the last round of each method."""
    lines = [f"| {workload['recipe']} | loss at the end | above `full` | seconds per step, by `full` | uplink |"]
    lines.append("|---|---:|---:|---:|---:|")
    for name, values in workload["methods"].items():
        end, above = values["loss"][-1], values["minus_full"]
        lines.append(
            f"| `{name}` | {end['mean']:.3f} ± {end['std']:.3f} | {above['mean']:+.3f} ± {above['std']:.3f} | "
            f"{values['seconds_by_full']:.2f} | {values['uplink_bytes'][-1] / 1000:.0f} kB |"
        )
    start = next(iter(workload["methods"].values()))["loss"][0]["mean"]
    return "\n".join([*lines, "", f"Seeds {workload['seeds']}; loss before training {start:.3f}."])


def plot(workloads: list[dict[str, Any]], path: Path) -> None:
    """A row per workload; columns: by local steps, by seconds, by bytes."""
    figure, axes = plt.subplots(len(workloads), 3, figsize=(11, 2.9 * len(workloads)), squeeze=False, sharey="row")
    for line, workload in zip(axes, workloads, strict=True):
        steps = [round * workload["local_steps"] for round in range(workload["rounds"] + 1)]
        for name, values in workload["methods"].items():
            losses = [point["mean"] for point in values["loss"]]
            seconds = [step * values["seconds_per_local_step"] for step in steps]
            kilobytes = [count / 1000 for count in values["uplink_bytes"]]
            for axis, xs in zip(line, (steps, seconds, kilobytes), strict=True):
                axis.plot(xs, losses, marker="o", markersize=3, color=COLORS.get(name), label=name)
        line[0].set_ylabel(f"{workload['recipe'].removeprefix('objectives_')}\nheld-out loss")
        for axis in line:
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
    for axis, label in zip(axes[-1], ("local steps", "seconds of local training", "uplink, kB"), strict=True):
        axis.set_xlabel(label)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", ncols=len(labels), frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.25 / len(workloads) ** 0.5 * 0.3))
    figure.savefig(path, dpi=110)


def main() -> None:
    """Read the runs, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders that `fedfstq simulate` wrote")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--plot", type=Path, default=PLOT)
    options = parser.parse_args()
    workloads = [read(folder) for folder in options.runs]
    options.out.write_text(json.dumps({"workloads": workloads}, indent=1) + "\n", encoding="utf-8")
    plot(workloads, options.plot)
    for workload in workloads:
        print(table(workload), end="\n\n")


if __name__ == "__main__":
    main()
