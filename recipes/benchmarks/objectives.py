"""What each token-filtered objective costs and gains: tables and a plot of runs of `evaluation/objectives_fed_*`.

    OMP_NUM_THREADS=1 fedfstq simulate evaluation/objectives_fed_med --seeds 3 --out runs/med     # likewise aya, code
    python recipes/benchmarks/objectives.py runs/med runs/aya runs/code

Reads each run's `metrics.jsonl` and writes `recipes/results/objectives.json` and `docs/images/objectives.png`: held-out
loss by local steps, by CPU time and by uplink bytes. Seeds that some method has not run to the last round are left out.
Runs share their machine with whatever else it does, so CPU time is not taken from them: it is local steps times the
cost of a step beside a plain one at a vocabulary of 32k, as `recipes/results/step.json` has it for some objectives.
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
STEP = ROOT / "recipes" / "results" / "step.json"
STEP_VARIANTS = {"full": "full", "soft": "soft", "unbiased-0.5": "unbiased", "hard-0.5": "hard"}
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


def spread(values: list[float]) -> dict[str, float | None]:
    """Mean and sample standard deviation; None for that of a single value."""
    deviation = round(statistics.stdev(values), 4) if len(values) > 1 else None
    return {"mean": round(statistics.fmean(values), 4), "std": deviation}


def shown(values: dict[str, float | None], form: str) -> str:
    """As text, with the deviation where there is one."""
    text = format(values["mean"], form)
    return text if values["std"] is None else f"{text} ± {values['std']:.3f}"


def step_costs() -> dict[str, float]:
    """CPU seconds of a step by a plain Trainer's, vocabulary 32k, per method; where measured."""
    median = json.loads(STEP.read_text(encoding="utf-8"))["vocab"]["32768"]["median"]
    return {name: median[variant]["cpu_ratio"] for name, variant in STEP_VARIANTS.items() if variant in median}


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
        found[method] = {
            "loss": [spread([run[r]["metric"] for run in mine]) for r in range(rounds + 1)],
            "minus_full": spread(
                [run[-1]["metric"] - whole["full", seed][-1]["metric"] for run, seed in zip(mine, seeds, strict=True)]
            ),
            "uplink_bytes": [
                round(statistics.fmean(run[r]["cumulative_uplink_bytes"] for run in mine)) for r in range(rounds + 1)
            ],
        }
    return {"recipe": recipe["name"], "seeds": seeds, "local_steps": steps, "rounds": rounds, "methods": found}


def table(workload: dict[str, Any]) -> str:
    """Markdown: the last round of each method."""
    lines = [f"| {workload['recipe']} | loss at the end | above `full` | uplink |", "|---|---:|---:|---:|"]
    for name, values in workload["methods"].items():
        end, above = shown(values["loss"][-1], ".3f"), shown(values["minus_full"], "+.3f")
        lines.append(f"| `{name}` | {end} | {above} | {values['uplink_bytes'][-1] / 1000:.0f} kB |")
    start = next(iter(workload["methods"].values()))["loss"][0]["mean"]
    return "\n".join([*lines, "", f"Seeds {workload['seeds']}; loss before training {start:.3f}."])


def plot(workloads: list[dict[str, Any]], path: Path) -> None:
    """A row per workload; columns: by local steps, by CPU time, by bytes."""
    costs = step_costs()
    figure, axes = plt.subplots(len(workloads), 3, figsize=(11, 2.9 * len(workloads)), squeeze=False, sharey="row")
    for line, workload in zip(axes, workloads, strict=True):
        steps = [round * workload["local_steps"] for round in range(workload["rounds"] + 1)]
        for name, values in workload["methods"].items():
            losses = [point["mean"] for point in values["loss"]]
            time = [step * costs[name] for step in steps] if name in costs else None
            kilobytes = [count / 1000 for count in values["uplink_bytes"]]
            for axis, xs in zip(line, (steps, time, kilobytes), strict=True):
                if xs is not None:
                    axis.plot(xs, losses, marker="o", markersize=3, color=COLORS.get(name), label=name)
        line[0].set_ylabel(f"{workload['recipe'].removeprefix('objectives_')}\nheld-out loss")
        for axis in line:
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
    for axis, label in zip(
        axes[-1], ("local steps", "CPU time, in steps of a plain Trainer (32k tokens)", "uplink, kB"), strict=True
    ):
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
