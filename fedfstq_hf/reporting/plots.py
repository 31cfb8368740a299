"""PNG plots of a comparison, drawn from metric rows: quality against bytes and against time, and bytes per round.

matplotlib is imported on first use, and only its Figure class: no pyplot, no global state, no display.
"""

import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedfstq_hf.reporting.comparison.summary import COMPARED, REFERENCE, Row, curves
from fedfstq_hf.reporting.units import format_bytes, format_ratio

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, safe for colour-blind readers. The two methods that every report compares keep their colours.
_OWN_COLORS = {REFERENCE: "#4d4d4d", COMPARED: "#0072b2"}
_COLORS = ("#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#a5870f")
_STYLES = ("-", "--", "-.", ":")
_METRIC_NAMES = {"eval_loss": "held-out loss (nats per token)", "exact_match": "exact match on held-out examples"}
_TIME_UNITS = (("hours", 3600), ("minutes", 60), ("seconds", 1))
_LOG_TIME_FROM = 8.0
"""Time is drawn on a log axis where the runs' lengths differ by more than this factor."""


def make_plots(rows: Iterable[Row], summary: Mapping[str, Any], folder: str | Path) -> list[Path]:
    """Draw every plot into `folder` and return the paths, in the order in which a report shows them."""
    rows = list(rows)
    figures = {"quality_vs_uplink.png": quality_vs_uplink(rows, summary)}
    for link in rows[0]["seconds"]:
        figures[f"quality_vs_time_{_file_name(link)}.png"] = quality_vs_time(rows, summary, link)
    figures["bytes_per_round.png"] = bytes_per_round(rows)
    paths = []
    for name, figure in figures.items():
        path = Path(folder) / name
        figure.savefig(path, dpi=150, facecolor="white", metadata={"Software": None})
        paths.append(path)
    return paths


def quality_vs_uplink(rows: Iterable[Row], summary: Mapping[str, Any]) -> "Figure":
    """Metric against cumulative uplink bytes of all clients, log axis, with the target and the distance along it."""
    figure, axes = _figure("cumulative uplink of all clients", summary)
    _draw_quality(axes, curves(rows), lambda row: float(row["cumulative_uplink_bytes"]))
    axes.set_xscale("log")
    _format_axis(axes.xaxis, _format_tick_bytes)
    _draw_target(axes, summary)
    ratio = summary["ratios"]["uplink_to_target"]
    if ratio is not None:
        ends = [float(summary["methods"][name]["uplink_bytes_to_target"]) for name in (REFERENCE, COMPARED)]
        _draw_distance(axes, summary["target"], ends, f"{format_ratio(ratio)} fewer bytes")
    _legend(figure, axes)
    return figure


def quality_vs_time(rows: Iterable[Row], summary: Mapping[str, Any], link: str) -> "Figure":
    """Metric against simulated seconds on `link`."""
    series = curves(rows)
    ends = [runs[-1]["seconds"][link] for by_seed in series.values() for runs in by_seed.values()]
    unit, divisor = next(item for item in _TIME_UNITS if max(ends) >= 3 * item[1] or item[1] == 1)
    figure, axes = _figure(f"simulated time on {link} ({unit})", summary)
    _draw_quality(axes, series, lambda row: float(row["seconds"][link]) / divisor)
    if min(ends) > 0 and max(ends) / min(ends) > _LOG_TIME_FROM:
        axes.set_xscale("log")
    else:
        axes.set_xlim(left=0)
    _format_axis(axes.xaxis, lambda value: f"{value:g}")
    _draw_target(axes, summary)
    ratio = summary["ratios"]["time_to_target"].get(link)
    if ratio is not None:
        times = [summary["methods"][name]["seconds_to_target"][link] for name in (REFERENCE, COMPARED)]
        _draw_distance(axes, summary["target"], [time / divisor for time in times], f"{format_ratio(ratio)} faster")
    _legend(figure, axes)
    return figure


def bytes_per_round(rows: Iterable[Row]) -> "Figure":
    """Bytes of all clients in each round, up and down, on one log axis."""
    from matplotlib.figure import Figure

    series = curves(rows)
    figure = Figure(figsize=(9.0, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, key, title in zip(panels, ("uplink_bytes", "downlink_bytes"), ("uplink", "downlink"), strict=True):
        for index, (method, by_seed) in enumerate(series.items()):
            # Methods often send the same number of bytes: side by side, none hides the other.
            shift = 0.6 * ((index + 0.5) / len(series) - 0.5)
            points = _by_round(by_seed, _shifted_round(shift), itemgetter(key))
            _draw_line(axes, index, method, points)
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("round")
        axes.xaxis.get_major_locator().set_params(integer=True)
        _style(axes)
    panels[0].set_yscale("log")
    panels[0].set_ylabel("bytes per round, all clients")
    _format_axis(panels[0].yaxis, _format_tick_bytes)
    _legend(figure, panels[0])
    return figure


def _shifted_round(shift: float) -> Callable[[Row], float]:
    return lambda row: float(row["round"]) + shift


def _figure(xlabel: str, summary: Mapping[str, Any]) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(xlabel)
    axes.set_ylabel(_METRIC_NAMES.get(summary["metric"], summary["metric"]))
    _style(axes)
    return figure, axes


def _style(axes: "Axes") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, which="major", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)


def _draw_quality(
    axes: "Axes", series: Mapping[str, Mapping[int, Sequence[Row]]], x_of: Callable[[Row], float]
) -> None:
    for index, (method, by_seed) in enumerate(series.items()):
        points = _by_round(by_seed, x_of, lambda row: None if row["metric"] is None else float(row["metric"]))
        _draw_line(axes, index, method, points)
    start = [runs[0]["metric"] for by_seed in series.values() for runs in by_seed.values()]
    if all(value is not None for value in start):
        level = statistics.fmean(start)
        axes.axhline(level, color="#9a9a9a", linewidth=0.9, linestyle=(0, (1, 2)), zorder=1)
        _note(axes, level, "before training")


Points = list[tuple[float, float, float]]
"""(x, mean, spread) per round; spread is 0 with one seed."""


def _by_round(
    by_seed: Mapping[int, Sequence[Row]], x_of: Callable[[Row], float], y_of: Callable[[Row], float | None]
) -> Points:
    """Mean over seeds, round by round from 1 on, while every seed has the round."""
    points: Points = []
    for rows in list(zip(*by_seed.values(), strict=False))[1:]:
        values = [value for value in map(y_of, rows) if value is not None]
        if len(values) == len(rows):
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            points.append((statistics.fmean(map(x_of, rows)), statistics.fmean(values), spread))
    return points


def _draw_line(axes: "Axes", index: int, method: str, points: Points) -> None:
    color = _OWN_COLORS.get(method, _COLORS[index % len(_COLORS)])
    x, mean, spread = (list(column) for column in zip(*points, strict=True)) if points else ([], [], [])
    style = "-" if method in _OWN_COLORS else _STYLES[1 + index % (len(_STYLES) - 1)]
    front = 4 if method == COMPARED else 3
    axes.plot(
        x,
        mean,
        style,
        color=color,
        label=method,
        linewidth=2.2 if method in _OWN_COLORS else 1.6,
        marker="o" if len(x) <= 30 else None,
        markersize=3.5,
        zorder=front,
    )
    if any(spread):
        low = [center - width for center, width in zip(mean, spread, strict=True)]
        high = [center + width for center, width in zip(mean, spread, strict=True)]
        axes.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0, zorder=front - 1)


def _draw_target(axes: "Axes", summary: Mapping[str, Any]) -> None:
    if summary["target"] is not None:
        axes.axhline(summary["target"], color="#222222", linewidth=1.0, linestyle=(0, (5, 3)), zorder=2)
        _note(axes, summary["target"], "target")


def _note(axes: "Axes", level: float, text: str) -> None:
    axes.annotate(
        text,
        (1.0, level),
        xycoords=("axes fraction", "data"),
        xytext=(-2, 3),
        textcoords="offset points",
        ha="right",
        va="bottom",
        fontsize=8.5,
        color="#555555",
    )


def _draw_distance(axes: "Axes", target: float, ends: Sequence[float], text: str) -> None:
    """An arrow along the target from the reference to the compared method, labelled with `text`."""
    arrow = {"arrowstyle": "-|>", "color": "#0072b2", "linewidth": 1.6, "shrinkA": 4, "shrinkB": 4}
    axes.annotate("", xy=(ends[1], target), xytext=(ends[0], target), arrowprops=arrow, zorder=5)
    middle = (ends[0] * ends[1]) ** 0.5 if axes.get_xscale() == "log" else sum(ends) / 2
    axes.annotate(
        text,
        (middle, target),
        xytext=(0, -6),
        textcoords="offset points",
        ha="center",
        va="top",
        fontsize=10,
        color="#0072b2",
        bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.7},
        zorder=6,
    )


def _format_axis(axis: Any, text_of: Callable[[float], str]) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: text_of(value)))
    axis.set_minor_formatter(NullFormatter())


def _format_tick_bytes(value: float) -> str:
    number, unit = format_bytes(value).split()
    return f"{float(number):g} {unit}"


def _legend(figure: "Figure", axes: "Axes") -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=min(len(labels), 6), frameon=False, fontsize=10)


def _file_name(link: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", link)
