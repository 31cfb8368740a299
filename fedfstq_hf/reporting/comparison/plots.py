"""Which charts a workload and a sweep have: quality against bytes and time, bytes per round, ratios at the targets."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean, stdev

from fedfstq_hf.reporting.chart import Axis, Chart, Level, Line, Point
from fedfstq_hf.reporting.comparison.figures import FRACTIONS, Comparison, Estimate, MethodFigures, Reached, Sweep
from fedfstq_hf.reporting.comparison.summary import COMPARED, REFERENCE, Row, metric_of, total_bytes
from fedfstq_hf.reporting.units import format_bytes, format_ratio, format_seconds, tick_bytes

_TIME_UNITS = ((3600, "h"), (60, "min"), (1, "s"))
_LOG_TIME_FROM = 8.0
"""Time is drawn on a log axis where the runs' lengths differ by more than this factor."""


def styles(comparisons: Iterable[Comparison]) -> dict[str, int]:
    """A style for each method, the same in every workload; the two that every report compares keep theirs."""
    result = {REFERENCE: 0, COMPARED: 1}
    for comparison in comparisons:
        for figures in comparison.methods:
            result.setdefault(figures.label, len(result))
    return result


def workload_charts(comparison: Comparison, style_of: Mapping[str, int]) -> list[Chart]:
    """All charts of a workload, those without a point left out."""
    charts = [_quality_vs_bytes(comparison, style_of, both_ways) for both_ways in (False, True)]
    charts += [_quality_vs_time(comparison, style_of, link) for link in comparison.links]
    charts += [_bytes_per_round(comparison, style_of, direction) for direction in ("uplink", "downlink")]
    if comparison.targets:
        less = f"to a target: times fewer bytes than {comparison.reference}"
        charts += [
            _ratios(comparison, style_of, "uplink_ratio", f"uplink {less}", lambda reached: reached.uplink_ratio),
            _ratios(comparison, style_of, "total_ratio", f"both ways {less}", lambda reached: reached.total_ratio),
        ]
        for link in comparison.links:
            title = f"time to a target on {link}: times sooner than {comparison.reference}"
            charts.append(_ratios(comparison, style_of, f"time_ratio_{file_name(link)}", title, _on_link(link)))
    return [chart for chart in charts if any(line.points for line in chart.lines)]


def sweep_chart(sweep: Sweep, style_of: Mapping[str, int]) -> Chart:
    """Final metric with its spread over seeds against the values of the sweep."""
    lines = []
    for label in sweep.methods:
        found = [(value, member.find(label)) for value, member in zip(sweep.values, sweep.comparisons, strict=True)]
        ends = [(value, figures.final) for value, figures in found if figures is not None]
        points = [(value, end.mean, end.spread or 0.0) for value, end in ends if end.mean is not None]
        lines.append(Line(label, style_of[label], points))
    drawn = [line for line in lines if line.points]
    texts = [f"{line.label} " + ", ".join(f"{y:.4g} at {x:g}" for x, y, _ in line.points) for line in drawn]
    title = f"{sweep.name}: final {sweep.metric} against {sweep.key}"
    x, y = Axis(sweep.key, ticks=sweep.values), Axis(f"final {sweep.metric}", text_of="{:.4g}".format)
    return Chart(f"final_vs_{file_name(sweep.key)}", title, f"{'; '.join(texts)}.", x, y, lines)


def file_name(text: str) -> str:
    """`text` with what a file's name should not have made a dash."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", text).strip("-") or "chart"


def _on_link(link: str) -> Callable[[Reached], Estimate]:
    return lambda reached: reached.times[link].ratio


def _quality_vs_bytes(comparison: Comparison, style_of: Mapping[str, int], both_ways: bool) -> Chart:
    what, name = ("traffic both ways", "total") if both_ways else ("uplink", "uplink")

    def sent(row: Row) -> float:
        return float(total_bytes(row) if both_ways else row["cumulative_uplink_bytes"])

    lines = _curves(comparison, style_of, sent, metric_of)
    x = Axis(f"cumulative {what} of all clients", log=True, text_of=tick_bytes)
    return _quality(comparison, f"quality_vs_{name}", f"cumulative {what}", x, lines, format_bytes)


def _quality_vs_time(comparison: Comparison, style_of: Mapping[str, int], link: str) -> Chart:
    lines = _curves(comparison, style_of, lambda row: float(row["seconds"][link]), metric_of)
    ends = [line.points[-1][0] for line in lines if line.points]
    seconds, unit = next(item for item in _TIME_UNITS if max(ends, default=0) >= 3 * item[0] or item[0] == 1)
    lines = [Line(line.label, line.style, [(x / seconds, y, s) for x, y, s in line.points]) for line in lines]
    log = bool(ends) and min(ends) > 0 and max(ends) / min(ends) > _LOG_TIME_FROM
    x = Axis(f"simulated time on {link} ({unit})", log, (None if log else 0.0, None), text_of="{:.4g}".format)
    name = f"quality_vs_time_{file_name(link)}"
    return _quality(comparison, name, f"simulated time, {link}", x, lines, lambda x: format_seconds((x or 0) * seconds))


def _quality(
    comparison: Comparison,
    name: str,
    against: str,
    x: Axis,
    lines: Sequence[Line],
    text_of: Callable[[float | None], str],
) -> Chart:
    workload, start = comparison.workload, comparison.start.mean
    metric, higher_is_better = workload.recipe.evaluation.metric, workload.recipe.evaluation.higher_is_better
    levels = [Level(fmean(values.values()), f"{100 * part:g} % target") for part, values in comparison.targets.items()]
    ends = [(line.label, *line.points[-1]) for line in lines if line.points]
    texts = [f"{label} ends at {y:.4f} after {text_of(at)}" for label, at, y, _ in ends]
    y = Axis(metric, text_of="{:.5g}".format)
    title = f"{workload.name}: {metric} against {against}"
    if start is not None:
        levels.append(Level(start, "before\ntraining"))
        # No further on the bad side of the start than the best lies on its good side, so that curves stay legible.
        values = [start, *(y for line in lines for _, y, _ in line.points)]
        best = max(values) if higher_is_better else min(values)
        worst = 2 * start - best
        if best != start and any(value < worst if higher_is_better else value > worst for value in values):
            y = Axis(metric, limits=(worst, None) if higher_is_better else (None, worst), text_of=y.text_of)
            title += " (what is far worse than before training lies outside)"
    alt = f"{metric} of each method, round by round. {'; '.join(texts)}."
    return Chart(name, title, alt, x, y, lines, levels)


def _bytes_per_round(comparison: Comparison, style_of: Mapping[str, int], direction: str) -> Chart:
    lines = _curves(comparison, style_of, lambda row: float(row["round"]), lambda row: float(row[f"{direction}_bytes"]))
    # Methods often send the same number of bytes: side by side, none hides the other.
    shifts = [0.4 * ((index + 0.5) / len(lines) - 0.5) for index in range(len(lines))]
    lines = [
        Line(line.label, line.style, [(x + shift, y, spread) for x, y, spread in line.points if y > 0])
        for line, shift in zip(lines, shifts, strict=True)
    ]
    drawn = [line for line in lines if line.points]
    means = [f"{line.label} {format_bytes(fmean(y for _, y, _ in line.points))} a round" for line in drawn]
    last = max((round(line.points[-1][0]) for line in drawn), default=1)
    step = math.ceil(last / 8)
    x = Axis("round", limits=(0.5, None), ticks=range(step, last + 1, step), text_of=lambda value: f"{round(value)}")
    y = Axis(f"{direction} of all clients", log=True, text_of=tick_bytes)
    title = f"{comparison.workload.name}: {direction} per round"
    return Chart(f"{direction}_per_round", title, f"Mean over rounds: {'; '.join(means)}.", x, y, lines)


def _ratios(
    comparison: Comparison, style_of: Mapping[str, int], name: str, title: str, ratio_of: Callable[[Reached], Estimate]
) -> Chart:
    lines = []
    for figures in comparison.methods:
        ratios = [(100 * fraction, ratio_of(reached)) for fraction, reached in figures.reached.items()]
        points = [(x, ratio.mean, ratio.spread or 0.0) for x, ratio in ratios if ratio.mean is not None]
        lines.append(Line(figures.label, style_of[figures.label], points))
    texts = [
        f"{line.label} " + (", ".join(f"{format_ratio(y)} at {x:g} %" for x, y, _ in line.points) or "at none")
        for line in lines
    ]
    marks = [100 * fraction for fraction in FRACTIONS]
    x = Axis(
        f"target: share of {comparison.reference}'s improvement (%)", limits=(marks[0] - 4, marks[-1] + 4), ticks=marks
    )
    y = Axis("ratio", log=True, text_of=lambda value: f"{value:.4g}×")
    alt = f"Ratio by target: {'; '.join(texts)}."
    levels = [Level(1.0, "as much")]
    return Chart(name, f"{comparison.workload.name}: {title}", alt, x, y, lines, levels)


def _curves(
    comparison: Comparison,
    style_of: Mapping[str, int],
    x_of: Callable[[Row], float],
    y_of: Callable[[Row], float | None],
) -> list[Line]:
    return [Line(f.label, style_of[f.label], _points(f, x_of, y_of)) for f in comparison.methods]


def _points(figures: MethodFigures, x_of: Callable[[Row], float], y_of: Callable[[Row], float | None]) -> list[Point]:
    """Mean over seeds from round 1 on; a round that some seed has no value for is left out."""
    points = []
    for rows in list(zip(*figures.series.values(), strict=False))[1:]:
        values = [value for value in map(y_of, rows) if value is not None]
        if len(values) == len(rows):
            spread = stdev(values) if len(values) > 1 else 0.0
            points.append((fmean(map(x_of, rows)), fmean(values), spread))
    return points
