"""Posted metrics as a model card needs them: finite numbers, those that hold for the published adapter, the chart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from fedfstq_hf.federation.history import HistoryRow
from fedfstq_hf.reporting.card.markup import one_line
from fedfstq_hf.reporting.chart import Axis, Chart, Level, Line
from fedfstq_hf.reporting.units import tick_bytes

MAIN_METRIC = "eval_loss"
_METRICS = {"eval_loss": "Held-out loss (nats per token)", "exact_match": "Exact match on held-out examples"}
_MAX_SOURCES = 6

Metrics = Mapping[int, Mapping[str, Mapping[str, float]]]
"""Round -> source, which names an evaluation set -> metric -> value."""


@dataclass(frozen=True)
class Measurement:
    """What a source measured: `value` on the adapter of `round`, `first` (where known) on that of round 0."""

    source: str
    name: str
    round: int
    value: float
    first: float | None


def finite(
    metrics: Mapping[int, Mapping[str, Mapping[str, Any]]], up_to: int
) -> dict[int, dict[str, dict[str, float]]]:
    """The finite numbers among what was posted for rounds `0 ... up_to`, sorted; anyone may have posted anything."""
    clean: dict[int, dict[str, dict[str, float]]] = {}
    for round in sorted(round for round in metrics if 0 <= round <= up_to):
        for source, posted in sorted(metrics[round].items()):
            values = {
                name: float(value) for name, value in sorted(posted.items()) if one_line(name) and _is_finite(value)
            }
            if values and one_line(source):
                clean.setdefault(round, {})[source] = values
    return clean


def main_metric(metrics: Metrics) -> str | None:
    """`eval_loss` where it was posted, else the first name; None without metrics."""
    names = [name for by_source in metrics.values() for posted in by_source.values() for name in posted]
    return MAIN_METRIC if MAIN_METRIC in names else next(iter(names), None)


def series(metrics: Metrics, name: str) -> dict[str, dict[int, float]]:
    """Source -> round -> value of one metric."""
    curves: dict[str, dict[int, float]] = {}
    for round, by_source in metrics.items():
        for source, posted in by_source.items():
            if name in posted:
                curves.setdefault(source, {})[round] = posted[name]
    return dict(sorted(curves.items()))


def newest(metrics: Metrics, history: Sequence[HistoryRow], round: int) -> list[Measurement]:
    """Per source and metric the newest value on the adapter of `round` or one that it was made from.

    After a rollback the rounds that it undid are left out: their quality says nothing about what is published.
    """
    wanted = _ancestors(history, round)
    found: dict[tuple[str, str], Measurement] = {}
    for made in wanted:
        for source, posted in metrics.get(made, {}).items():
            for name, value in posted.items():
                first = metrics.get(0, {}).get(source, {}).get(name) if made else None
                found.setdefault((source, name), Measurement(source, name, made, value, first))
    return [found[key] for key in sorted(found)]


def quality_vs_uplink(history: Sequence[HistoryRow], metrics: Metrics) -> Chart | None:
    """The main metric against the bytes that the clients have sent so far: a line for each source, the first six.

    What stood before the first byte was sent is a level, since a log axis has no zero. None where there is nothing to
    draw: values of fewer than two rounds, or none after the first byte was sent.
    """
    name = main_metric(metrics)
    if name is None:
        return None
    sent = dict(zip([row.round for row in history], accumulate(row.uplink_bytes for row in history), strict=True))
    curves = {
        source: [(sent[round], value) for round, value in sorted(values.items()) if round in sent]
        for source, values in series(metrics, name).items()
    }
    known = {round for by_round in series(metrics, name).values() for round in by_round if round in sent}
    shown = {source: points for source, points in curves.items() if any(x > 0 for x, _ in points)}
    if len(known) < 2 or not shown:
        return None
    lines, levels = [], []
    for style, (source, points) in enumerate(list(shown.items())[:_MAX_SOURCES], start=1):
        lines.append(Line(source, style, [(x, y, 0.0) for x, y in points if x > 0]))
        levels += [Level(y, "before\ntraining", style) for x, y in points if x == 0][-1:]
    title = f"{_METRICS.get(name, name)} against cumulative uplink"
    alt = f"{name} against cumulative uplink bytes of all clients"
    x = Axis("cumulative uplink of all clients", log=True, text_of=tick_bytes)
    return Chart("quality_vs_uplink", title, alt, x, Axis(name, text_of="{:.5g}".format), lines, levels)


def _is_finite(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float holds
        return False


def _ancestors(history: Sequence[HistoryRow], round: int) -> list[int]:
    """`round` and the rounds that it was made from, newest first."""
    restored = {row.round: row.restored_from for row in history if row.restored_from is not None}
    rounds = [round]
    while rounds[-1] > 0:
        before = rounds[-1] - 1
        rounds.append(min(restored.get(rounds[-1], before), before))
    return rounds
