"""Metric rows as a simulation writes them, from plain lists of metrics."""

from typing import Any


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
            "energy": {"lte-20mbps": {"mean": 4.0, "straggler": 9.5}} if number else None,
        }
        for number, metric in enumerate(metrics)
    ]
