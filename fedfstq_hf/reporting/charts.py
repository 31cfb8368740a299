"""The charts of one workload: quality against bytes and time, bytes per round, and how much less than the reference."""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, stdev

from fedfstq_hf.reporting.chart import Axis, Chart, Point, Series, make_axis
from fedfstq_hf.reporting.comparison.figures import FRACTIONS, Comparison, Estimate, MethodFigures, Reached, Sweep
from fedfstq_hf.reporting.comparison.summary import COMPARED, REFERENCE, Row, metric_of
from fedfstq_hf.reporting.units import format_bytes, format_ratio, format_seconds

_TIME_UNITS = ((3600, "h"), (60, "min"), (1, "s"))
_LOG_TIME_FROM = 8.0
"""Time is drawn on a log axis where the runs' lengths differ by more than this factor."""


def styles(comparisons: Sequence[Comparison]) -> dict[str, int]:
    """A style for each method, the same in every workload; the two that every report compares keep theirs."""
    result = {REFERENCE: 0, COMPARED: 1}
    for comparison in comparisons:
        for figures in comparison.methods:
            result.setdefault(figures.label, len(result))
    return result


def make_charts(comparison: Comparison, style_of: Mapping[str, int], key: str) -> list[Chart]:
    """All charts of a workload, those without a point left out. `key` begins their ids."""
    charts = [_quality_vs_uplink(comparison, style_of, f"{key}-uplink")]
    for number, link in enumerate(comparison.links):
        charts.append(_quality_vs_time(comparison, style_of, f"{key}-time{number}", link))
    for name in ("uplink", "downlink"):
        charts.append(_bytes_per_round(comparison, style_of, f"{key}-round-{name}", name))
    if comparison.targets:
        title = f"Uplink to a target: times fewer bytes than {comparison.reference}"
        charts.append(_ratios(comparison, style_of, f"{key}-ratio", title, lambda reached: reached.uplink_ratio))
        for number, link in enumerate(comparison.links):
            title = f"Time to a target on {link}: times sooner than {comparison.reference}"
            charts.append(_ratios(comparison, style_of, f"{key}-sooner{number}", title, _on_link(link)))
    return [chart for chart in charts if any(series.points for series in chart.series)]


def _on_link(link: str) -> Callable[[Reached], Estimate]:
    return lambda reached: reached.seconds_ratio[link]


def _quality_vs_uplink(comparison: Comparison, style_of: Mapping[str, int], key: str) -> Chart:
    series = _curves(comparison, style_of, lambda row: float(row["cumulative_uplink_bytes"]), metric_of)
    x = make_axis("cumulative uplink of all clients", _xs(series), log=True, text_of=_tick_bytes)
    return _quality(comparison, key, "Quality against cumulative uplink", x, series, format_bytes)


def _quality_vs_time(comparison: Comparison, style_of: Mapping[str, int], key: str, link: str) -> Chart:
    series = _curves(comparison, style_of, lambda row: float(row["seconds"][link]), metric_of)
    ends = [line.points[-1][0] for line in series if line.points]
    seconds, unit = next(item for item in _TIME_UNITS if max(ends, default=0) >= 3 * item[0] or item[0] == 1)
    scaled = [
        Series(line.label, line.style, [(x / seconds, y, spread) for x, y, spread in line.points]) for line in series
    ]
    log = bool(ends) and min(ends) > 0 and max(ends) / min(ends) > _LOG_TIME_FROM
    axis = make_axis(f"simulated time on {link} ({unit})", _xs(scaled), log=log, zero=True)
    title = f"Quality against simulated time, {link}"
    return _quality(comparison, key, title, axis, scaled, lambda value: format_seconds((value or 0) * seconds))


def _quality(
    comparison: Comparison,
    key: str,
    title: str,
    x: Axis,
    series: Sequence[Series],
    text_of: Callable[[float | None], str],
) -> Chart:
    metric = comparison.workload.recipe.evaluation.metric
    levels = [
        (fmean(values.values()), f"{100 * fraction:g} % target") for fraction, values in comparison.targets.items()
    ]
    shown = [y + sign * spread for line in series for _, y, spread in line.points for sign in (-1, 1)]
    ends: list[tuple[float, str]] = []
    start = comparison.start.mean
    if start is not None:
        ends.append((start, "before training"))
        shown = _without_diverged([*shown, start], start, comparison.workload.recipe.evaluation.higher_is_better)
    texts = [
        f"{line.label} ends at {line.points[-1][1]:.4f} after {text_of(line.points[-1][0])}"
        for line in series
        if line.points
    ]
    alt = f"{metric} of each method, round by round. {'; '.join(texts)}."
    y = make_axis(metric, shown)
    if any(not y.low <= point[1] <= y.high for line in series for point in line.points):
        title += " (what is far worse than before training lies outside)"
    return Chart(key, title, alt, x, y, series, levels, ends)


def _without_diverged(values: Sequence[float], start: float, higher_is_better: bool) -> list[float]:
    """Values no further on the bad side of `start` than the best lies on its good side, so that curves stay legible."""
    best = max(values) if higher_is_better else min(values)
    worst = start - (best - start)
    return [max(value, worst) if higher_is_better else min(value, worst) for value in values]


def _bytes_per_round(comparison: Comparison, style_of: Mapping[str, int], key: str, name: str) -> Chart:
    series = _curves(comparison, style_of, lambda row: float(row["round"]), lambda row: float(row[f"{name}_bytes"]))
    # Methods often send the same number of bytes: side by side, none hides the other.
    shifts = [0.4 * ((index + 0.5) / len(series) - 0.5) for index in range(len(series))]
    series = [
        Series(line.label, line.style, [(x + shift, y, spread) for x, y, spread in line.points if y > 0])
        for line, shift in zip(series, shifts, strict=True)
    ]
    ys = [y for line in series for _, y, _ in line.points]
    means = [
        f"{line.label} {format_bytes(fmean(y for _, y, _ in line.points))} a round" for line in series if line.points
    ]
    last = max((round(x) for x in _xs(series)), default=1)
    rounds = make_axis("round", _xs(series))
    step = math.ceil(last / 8)
    rounds = Axis("round", min(rounds.low, 0.5), rounds.high, False, rounds.text_of, tuple(range(step, last + 1, step)))
    y = make_axis(f"{name} of all clients", ys, log=True, text_of=_tick_bytes)
    return Chart(key, f"{name.capitalize()} per round", f"Mean over rounds: {'; '.join(means)}.", rounds, y, series)


def _ratios(
    comparison: Comparison,
    style_of: Mapping[str, int],
    key: str,
    title: str,
    ratio_of: Callable[[Reached], Estimate],
) -> Chart:
    series = []
    for figures in comparison.methods:
        ratios = [(100 * fraction, ratio_of(reached)) for fraction, reached in figures.reached.items()]
        points = [(x, ratio.mean, ratio.spread or 0.0) for x, ratio in ratios if ratio.mean is not None]
        series.append(Series(figures.label, style_of[figures.label], points))
    texts = [
        f"{line.label} " + ", ".join(f"{format_ratio(y)} at {x:g} %" for x, y, _ in line.points)
        if line.points
        else f"{line.label} at none"
        for line in series
    ]
    marks = tuple(100 * fraction for fraction in FRACTIONS)
    label = f"target: share of {comparison.reference}'s improvement (%)"
    x = Axis(label, marks[0] - 4, marks[-1] + 4, False, lambda value: f"{value:g}", marks)
    ys = [1.0, *(y for line in series for _, y, _ in line.points)]
    y = make_axis("ratio", ys, log=True, text_of=lambda value: f"{value:g}×")
    return Chart(key, title, f"Ratio by target: {'; '.join(texts)}.", x, y, series, ends=[(1.0, "as much")])


def _curves(
    comparison: Comparison,
    style_of: Mapping[str, int],
    x_of: Callable[[Row], float],
    y_of: Callable[[Row], float | None],
) -> list[Series]:
    return [Series(f.label, style_of[f.label], _points(f, x_of, y_of)) for f in comparison.methods]


def _points(figures: MethodFigures, x_of: Callable[[Row], float], y_of: Callable[[Row], float | None]) -> list[Point]:
    """Mean over seeds from round 1 on; a round that some seed has no value for is left out."""
    points = []
    for rows in list(zip(*figures.series.values(), strict=False))[1:]:
        values = [value for value in map(y_of, rows) if value is not None]
        if len(values) == len(rows):
            spread = stdev(values) if len(values) > 1 else 0.0
            points.append((fmean(map(x_of, rows)), fmean(values), spread))
    return points


def _xs(series: Sequence[Series]) -> list[float]:
    return [x for line in series for x, _, _ in line.points]


def _tick_bytes(value: float) -> str:
    number, unit = format_bytes(value).split()
    return f"{float(number):g} {unit}"


def sweep_chart(sweep: Sweep, style_of: Mapping[str, int], key: str) -> Chart:
    """Final metric with its spread over seeds against the values of the sweep. `key` begins the chart's ids."""
    series = []
    for label in sweep.methods:
        points = []
        for value, member in zip(sweep.values, sweep.comparisons, strict=True):
            figures = member.find(label)
            if figures is not None and figures.final.mean is not None:
                points.append((value, figures.final.mean, figures.final.spread or 0.0))
        series.append(Series(label, style_of[label], points))
    texts = [
        f"{line.label} " + ", ".join(f"{y:.4g} at {x:g}" for x, y, _ in line.points) for line in series if line.points
    ]
    around = make_axis(sweep.key, sweep.values)
    x = Axis(around.label, around.low, around.high, False, around.text_of, sweep.values)
    y = make_axis(
        f"final {sweep.metric}", [y + sign * s for line in series for _, y, s in line.points for sign in (-1, 1)]
    )
    return Chart(key, f"Final {sweep.metric} against {sweep.key}", f"{'; '.join(texts)}.", x, y, series)
