"""Colours of token sensitivities on a log scale, the same in HTML and in a plot."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

# Light enough at both ends for black text: 18:1 and 7:1 contrast.
COLORS = ("#fff8e8", "#fdcf8a", "#e8762b")


@dataclass(frozen=True)
class Shades:
    """Maps scores between `low` and `high` (both > 0) to colours; `None` for both where nothing was measured."""

    low: float | None
    high: float | None

    @classmethod
    def of(cls, scores: Iterable[float]) -> Shades:
        """From the smallest to the largest finite score above 0."""
        measured = [score for score in scores if 0 < score < math.inf]
        return cls(min(measured), max(measured)) if measured else cls(None, None)

    def position(self, score: float) -> float:
        """Place of a score on the scale, 0 for `low` or less to 1 for `high` or more."""
        if self.low is None or self.high is None or score <= self.low:
            return 0.0
        return min(1.0, math.log(score / self.low) / math.log(self.high / self.low))

    def color(self, score: float) -> str:
        """`#rrggbb` of a finite score."""
        place = self.position(score) * (len(COLORS) - 1)
        first = min(int(place), len(COLORS) - 2)
        return _mix(COLORS[first], COLORS[first + 1], place - first)


def _mix(first: str, second: str, share: float) -> str:
    pairs = [(int(first[i : i + 2], 16), int(second[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(a + share * (b - a)):02x}" for a, b in pairs)
