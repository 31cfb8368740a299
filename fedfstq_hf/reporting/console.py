"""The end of a simulation in the terminal: a line per method and the ratios."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedfstq_hf.reporting.summary import COMPARED, REFERENCE
from fedfstq_hf.reporting.units import format_bytes, format_figure, format_ratio


def render_summary(summary: Mapping[str, Any]) -> str:
    """The figures of `summary.json` that one looks at first."""
    metric, spread = summary["metric"], summary["spread"]
    width = max(len(name) for name in summary["methods"])
    lines = [f"{'method':<{width}}  final {metric:<18} uplink to target   uplink in total"]
    for name, figures in summary["methods"].items():
        final = format_figure(figures["final_metric"], spread["methods"][name]["final_metric"])
        to_target = figures["uplink_bytes_to_target"]
        reached = "not reached" if to_target is None else format_bytes(to_target)
        lines.append(f"{name:<{width}}  {final:<24} {reached:<18} {format_bytes(figures['uplink_bytes'])}")
    ratios = summary["ratios"]
    if ratios["uplink_to_target"] is not None:
        figure = format_ratio(ratios["uplink_to_target"], spread["ratios"]["uplink_to_target"])
        lines.append(f"{COMPARED} reached the target with {figure} less uplink than {REFERENCE}")
        for link, ratio in ratios["time_to_target"].items():
            if ratio is not None:
                figure = format_ratio(ratio, spread["ratios"]["time_to_target"][link])
                lines.append(f"  and, on link {link}, {figure} sooner (simulated clock)")
    return "\n".join(lines)
