"""The chart of a sweep: where each method ended, against the setting that changes."""

from collections.abc import Mapping

from fedfstq_hf.reporting.comparison_sweep import Sweep
from fedfstq_hf.reporting.page_axis import Axis, make_axis
from fedfstq_hf.reporting.page_chart import Chart, Series


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
