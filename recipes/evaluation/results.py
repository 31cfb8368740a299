"""`recipes/results/*.json`: the figures of finished runs, small enough to commit, with all that is needed to rerun."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import zstandard

from fedfstq_hf.federation import storage
from fedfstq_hf.reporting.comparison.figures import Comparison, Estimate, MethodFigures, Reached, compare
from fedfstq_hf.reporting.comparison.runs import read_archive, read_runs
from fedfstq_hf.reporting.comparison.summary import read_rows
from fedfstq_hf.reporting.comparison.workloads import group_runs, settings_text

_LEVEL = 19
_TIMES = {
    "seconds": "seconds",
    "times_sooner": "ratio",
    "ceiling": "ceiling",
    "share_of_ceiling": "share",
    "share_in_reference_rounds": "reference_share",
}


def write_result(archive: Path, path: Path) -> Path:
    """Write the figures of the runs in an archive to `path` and return it.

    Bytes are totals over all clients, seconds are simulated, ratios are the reference's figure over the method's; each
    figure is `[mean, sample standard deviation]` over seeds, null where a seed lacks it.
    """
    facts = [run["ledger"] for run in read_archive(archive)]
    tree: dict[str, Any] = {
        "commands": sorted({fact["command"] for fact in facts if fact.get("command")}),
        "commits": sorted({fact["commit"] for fact in facts if fact.get("commit")}),
        "minutes": round(sum(fact.get("minutes", 0.0) for fact in facts), 1),
        "cores": sorted({fact["cores"] for fact in facts if fact.get("cores")}),
        "devices": sorted({fact.get("device", "CPU") for fact in facts if fact}),
        "workloads": [_workload(compare(workload)) for workload in group_runs(read_runs([archive]))],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    storage.replace_file(path, (json.dumps(tree, indent=1) + "\n").encode(), durable=False)
    return path


def _workload(comparison: Comparison) -> dict[str, Any]:
    recipe = comparison.workload.recipe
    federation = ("alpha", "clients", "clients_per_round", "rounds", "dropout", "packet_loss")
    return {
        "recipe": recipe.name,
        "model": recipe.model,
        **{name: getattr(recipe.federation, name) for name in federation},
        "metric": recipe.evaluation.metric,
        "before_training": _pair(comparison.start),
        "targets": {f"{part:g}": values for part, values in comparison.targets.items()},
        "methods": {figures.label: _method(figures) for figures in comparison.methods},
    }


def _method(figures: MethodFigures) -> dict[str, Any]:
    return {
        "settings": settings_text(figures.method.settings),
        "seeds": list(figures.series),
        "final": _pair(figures.final),
        "uplink_bytes": _pair(figures.uplink),
        "downlink_bytes": _pair(figures.downlink),
        "to_target": {f"{part:g}": _reached(reached) for part, reached in figures.reached.items()},
        "energy_joules": {
            link: {"mean": mean, "straggler": straggler} for link, (mean, straggler) in figures.energy.items()
        },
    }


def _reached(reached: Reached) -> dict[str, Any]:
    by_link = {
        name: {link: _pair(getattr(times, attribute)) for link, times in reached.times.items()}
        for name, attribute in _TIMES.items()
    }
    both_ways = {"total_bytes": _pair(reached.total), "times_fewer_total_bytes": _pair(reached.total_ratio)}
    uplink = {"uplink_bytes": _pair(reached.uplink), "times_fewer_bytes": _pair(reached.uplink_ratio)}
    return uplink | both_ways | by_link


def _pair(value: Estimate) -> list[float | None]:
    return [None if part is None else float(f"{part:.6g}") for part in (value.mean, value.spread)]


def add_to_archive(path: Path, folders: Mapping[str, Path]) -> Path:
    """Put finished runs into an archive, beside those that are in it or in the place of an earlier one of their name.

    Args:
        path: the archive; made where there is none.
        folders: name of the run -> its folder, as the ledger of the evaluation left it.
    """
    runs = {run["run"]: run for run in read_archive(path)} if path.exists() else {}
    for name, folder in folders.items():
        runs[name] = {
            "run": name,
            "recipe": json.loads((folder / "recipe.json").read_text(encoding="utf-8")),
            "ledger": json.loads((folder / "ledger.json").read_text(encoding="utf-8")),
            "rows": read_rows(folder / "metrics.jsonl"),
        }
    path.parent.mkdir(parents=True, exist_ok=True)
    storage.replace_file(path, _compressed(runs[name] for name in sorted(runs)), durable=False)
    return path


def _compressed(runs: Iterable[Mapping[str, Any]]) -> bytes:
    """The same runs give the same bytes."""
    text = "".join(json.dumps(run, sort_keys=True, separators=(",", ":")) + "\n" for run in runs)
    return zstandard.ZstdCompressor(level=_LEVEL).compress(text.encode())
