"""Posted metrics as a model card needs them: finite numbers, and those that hold for the published adapter."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedfstq_hf.federation.history import HistoryRow
from fedfstq_hf.reporting.card.markup import one_line

MAIN_METRIC = "eval_loss"

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
