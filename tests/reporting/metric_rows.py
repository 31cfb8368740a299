"""Metric rows as a simulation writes them, from plain lists of metrics."""

import json
from pathlib import Path
from typing import Any

from fedfstq_hf.recipe import load_recipe


def make_rows(
    method: str, metrics: list[float | None], *, seed: int = 0, bytes_per_round: int = 100, seconds: float = 2.0
) -> list[dict[str, Any]]:
    """One row per entry of `metrics`, the first being round 0."""
    return [
        {
            "method": method,
            "seed": seed,
            "round": number,
            "metric": metric,
            "eval_loss": metric,
            "uplink_bytes": bytes_per_round if number else 0,
            "downlink_bytes": 1000 if number else 0,
            "cumulative_uplink_bytes": bytes_per_round * number,
            "cumulative_downlink_bytes": 1000 * number,
            "seconds": {"lte-20mbps": seconds * number, "straggler-tail": 3 * seconds * number},
            "num_updates": 4 if number else 0,
            "num_dropped": 0,
            "compute_seconds": 1.0 if number else 0.0,
            "clients": [0, 1, 2, 3] if number else [],
            "client_compute_seconds": [1.0] * 4 if number else [],
            "client_air_bytes": [bytes_per_round / 4] * 4 if number else [],
            "client_downlink_bytes": [250] * 4 if number else [],
            "energy": {"lte-20mbps": {"mean": 4.0, "straggler": 9.5}} if number else None,
        }
        for number, metric in enumerate(metrics)
    ]


def write_run(
    folder: Path, rows: list[dict[str, Any]], *, methods: dict[str, Any] | None = None, **overrides: Any
) -> Path:
    """A run folder of recipe `fed_med`, of 4 rounds, with these rows."""
    recipe = load_recipe("fed_med", {"rounds": 4, **overrides}).to_dict()
    names = list(dict.fromkeys(row["method"] for row in rows)) or ["fedavg"]
    plain = next(iter(recipe["methods"].values()))
    recipe["methods"] = {name: recipe["methods"].get(name, plain) for name in names} | (methods or {})
    recipe["seeds"] = sorted({row["seed"] for row in rows}) or [0]
    folder.mkdir(parents=True)
    (folder / "recipe.json").write_text(json.dumps(recipe))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
