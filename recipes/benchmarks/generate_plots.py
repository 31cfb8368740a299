"""Tables and plots of `generate.py`'s results: speed-up against prompt length, and quality against keep ratio."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

Row = dict[str, Any]
# Okabe and Ito's palette, safe for colour-blind readers.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#a5870f", "#4d4d4d")


def tables(results: Mapping[str, list[Row]]) -> str:
    """Markdown tables of whatever was measured."""
    parts = []
    if rows := results.get("speed"):
        lines = [
            "| clock | prompt | variant | first token | end to end | range | peak MB | rounds |",
            "|---|--:|---|--:|--:|---|--:|--:|",
        ]
        for row in sorted(
            rows, key=lambda row: (row["device"], row["prompt"], row["variant"] != "dense", row["variant"])
        ):
            low, high = row["first_token_range"]
            cells = [
                f"{row['clock']}, {row['threads']} threads" if row["device"] == "cpu" else row["device"],
                row["prompt"],
                row["variant"],
                f"{row['first_token_speedup']:.2f}x ({row['first_token_seconds']:.2f} s)",
                f"{row['end_to_end_speedup']:.2f}x ({row['end_to_end_seconds']:.2f} s)",
                f"{low:.2f} to {high:.2f}",
                row["peak_megabytes"],
                row["rounds"],
            ]
            lines.append(f"| {' | '.join(map(str, cells))} |")
        parts.append("\n".join(lines))
    for task in sorted({row["task"] for row in results.get("quality", [])}):
        rows = [row for row in results["quality"] if row["task"] == task]
        ratios = sorted({row["keep_ratio"] for row in rows}, reverse=True)
        lines = [
            f"| {task} | " + " | ".join(f"keep {ratio}" for ratio in ratios) + " |",
            "|---|" + "--:|" * len(ratios),
        ]
        for scorer in dict.fromkeys(row["scorer"] for row in sorted(rows, key=_order)):
            found = {row["keep_ratio"]: _values(row) for row in rows if row["scorer"] == scorer}
            lines.append(f"| {scorer} | " + " | ".join(_cell(found.get(ratio)) for ratio in ratios) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def draw(results: Mapping[str, list[Row]], folder: Path) -> list[Path]:
    """Write generate_speed.png and generate_quality.png, as far as there are results."""
    paths = []
    for name, figure in (("speed", _speed(results.get("speed"))), ("quality", _quality(results.get("quality")))):
        if figure is not None:
            path = folder / f"generate_{name}.png"
            figure.savefig(path, dpi=150, facecolor="white", metadata={"Software": None})
            paths.append(path)
    return paths


def _speed(rows: list[Row] | None) -> Figure | None:
    rows = [row for row in rows or [] if row["variant"].startswith("default") and "rerun" not in row["variant"]]
    rows = [row for row in rows if row["clock"] == "wall"] or rows
    if len({row["prompt"] for row in rows}) < 3:
        return None
    figure = Figure(figsize=(9.0, 4.2), layout="constrained")
    for axes, part in zip(figure.subplots(1, 2, sharey=True), ("first_token", "end_to_end"), strict=True):
        for color, variant in zip(COLORS, sorted({row["variant"] for row in rows}), strict=False):
            points = sorted((row["prompt"], row[f"{part}_speedup"]) for row in rows if row["variant"] == variant)
            axes.plot(*zip(*points, strict=True), marker="o", color=color, label=variant.replace("default", "keep"))
        axes.axhline(1.0, color="#9a9a9a", linewidth=0.9, linestyle=":")
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks := sorted({row["prompt"] for row in rows}), [str(tick) for tick in ticks])
        axes.set_xlabel("prompt (tokens)")
        axes.set_title(
            {"first_token": "time to first token", "end_to_end": "end to end, 32 new tokens"}[part], fontsize=11
        )
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, color="#e6e6e6")
    figure.axes[0].set_ylabel("speed-up over dense")
    figure.axes[0].legend(frameon=False)
    return figure


def _quality(rows: list[Row] | None) -> Figure | None:
    if not rows:
        return None
    tasks = sorted({row["task"] for row in rows})
    figure = Figure(figsize=(1.6 + 4.5 * len(tasks), 4.2), layout="constrained")
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        own = sorted((row for row in rows if row["task"] == task), key=_order)
        (dense,) = [row for row in own if row["scorer"] == "dense"]
        axes.axhline(statistics.fmean(_values(dense)), color="#9a9a9a", linestyle=":", label="dense")
        for color, scorer in zip(COLORS, dict.fromkeys(row["scorer"] for row in own if row is not dense), strict=False):
            found = sorted((row["keep_ratio"], _values(row)) for row in own if row["scorer"] == scorer)
            spread = [statistics.stdev(values) if len(values) > 1 else 0.0 for _, values in found]
            means = [statistics.fmean(values) for _, values in found]
            axes.errorbar([x for x, _ in found], means, spread, marker="o", color=color, label=scorer, capsize=2)
        axes.set_title(task, fontsize=11)
        axes.set_xlabel("share of prompt tokens kept")
        axes.set_ylabel("exact match" if "exact_match" in dense else "nats per answer token")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(True, color="#e6e6e6")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    return figure


def _values(row: Row) -> list[float]:
    return list(row.get("exact_match") or row.get("answer_loss") or [])


def _cell(values: list[float] | None) -> str:
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"


def _order(row: Row) -> tuple[int, str]:
    names = ["dense", "default", "default, rerun", "combined", "table", "probe", "rarity", "recency", "random"]
    return names.index(row["scorer"]), row["scorer"]
