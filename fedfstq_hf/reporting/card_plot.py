"""The model card's plot: held-out quality against the bytes that the clients have sent so far."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from fedfstq_hf.federation.history import HistoryRow
from fedfstq_hf.reporting.card.measurements import Metrics, main_metric, series
from fedfstq_hf.reporting.units import format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, safe for colour-blind readers, as in the other plots.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_STYLES = ("-", "--", "-.", ":")
_LABELS = {"eval_loss": "held-out loss (nats per token)", "exact_match": "exact match on held-out examples"}
_MAX_LABEL = 32
_CLOSE = 100

Points = list[tuple[int, float]]
"""(cumulative uplink bytes, value) in the order of rounds."""


def curves(history: Sequence[HistoryRow], metrics: Metrics) -> dict[str, Points]:
    """Source -> points of the main metric, of rounds with a row.

    Empty where there is nothing to plot: values of fewer than two rounds, or none after the first byte was sent.
    """
    name = main_metric(metrics)
    if name is None:
        return {}
    sent = dict(zip([row.round for row in history], accumulate(row.uplink_bytes for row in history), strict=True))
    drawn = {
        source: [(sent[round], value) for round, value in sorted(values.items()) if round in sent]
        for source, values in series(metrics, name).items()
    }
    rounds = {round for values in series(metrics, name).values() for round in values if round in sent}
    if len(rounds) < 2 or not any(x > 0 for points in drawn.values() for x, _ in points):
        return {}
    return {source: points for source, points in drawn.items() if any(x > 0 for x, _ in points)}


def quality_vs_uplink(history: Sequence[HistoryRow], metrics: Metrics) -> bytes | None:
    """PNG of the main metric against cumulative uplink bytes on a log axis, or None where there is nothing to plot.

    One line per source, the first six by name. What stood before the first byte was sent is a level, since a log axis
    has no zero. The ground is white and not transparent, so that the text can be read on a dark page too. The same
    input gives the same bytes.
    """
    from matplotlib.text import Text

    drawn = curves(history, metrics)
    name = main_metric(metrics)
    if not drawn or name is None:
        return None
    shown = dict(list(drawn.items())[: len(_COLORS)])
    sent = [x for points in shown.values() for x, _ in points if x > 0]
    figure, axes = _figure(_LABELS.get(name, _short(name)), close=max(sent) < _CLOSE * min(sent))
    for number, (source, points) in enumerate(shown.items()):
        _draw(axes, number, source, points)
    if len(shown) > 1:
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=3, frameon=False, fontsize=10)
    else:
        axes.set_title(f"measured on {_short(next(iter(shown)))}", loc="left", fontsize=10, color="#555555")
    for text in figure.findobj(Text):  # names are others': neither formulas nor TeX, whatever this machine's settings
        text.set_parse_math(False)
        text.set_usetex(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def _figure(ylabel: str, *, close: bool) -> tuple[Figure, Axes]:
    """Empty axes; `close` where the bytes span so little that powers of ten alone would hardly label the axis."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure = Figure(figsize=(7.2, 4.0), layout="constrained")
    axes = figure.subplots()
    axes.set_xscale("log")
    if close:
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("cumulative uplink of all clients")
    axes.set_ylabel(ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, which="major", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def _draw(axes: Axes, number: int, source: str, points: Points) -> None:
    color = _COLORS[number]
    sent = [(x, y) for x, y in points if x > 0]
    axes.plot(
        [x for x, _ in sent],
        [y for _, y in sent],
        _STYLES[number % len(_STYLES)],
        color=color,
        label=_short(source),
        linewidth=2.0,
        marker="o" if len(sent) <= 30 else None,
        markersize=4,
        zorder=3,
    )
    before = [y for x, y in points if x == 0]
    if before:
        axes.axhline(before[-1], color=color, alpha=0.6, linewidth=0.9, linestyle=(0, (1, 2)), zorder=1)
        if number == 0:
            axes.annotate(
                "before training",
                (1.0, before[-1]),
                xycoords=("axes fraction", "data"),
                xytext=(-2, 3),
                textcoords="offset points",
                ha="right",
                va="bottom",
                fontsize=8.5,
                color="#555555",
            )


def _short(text: str) -> str:
    """A source's or metric's name as a label."""
    printable = "".join(char for char in text if char.isprintable())
    return printable if len(printable) <= _MAX_LABEL else printable[: _MAX_LABEL - 1] + "…"


def _tick(value: float) -> str:
    number, unit = format_bytes(value).split()
    return f"{float(number):g} {unit}"
