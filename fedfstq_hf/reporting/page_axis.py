"""Axes of the page's charts: a range, linear or logarithmic, and round values to mark on it."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """Values from `low` to `high`; `text_of` writes a mark."""

    label: str
    low: float
    high: float
    log: bool
    text_of: Callable[[float], str]
    fixed_marks: tuple[float, ...] = ()

    def place(self, value: float) -> float:
        """Where `value` stands, 0 at `low` and 1 at `high`."""
        if self.log:
            return (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return (value - self.low) / (self.high - self.low)

    def marks(self) -> list[float]:
        """At most eight round values within the range, or those that were fixed."""
        if self.fixed_marks:
            return list(self.fixed_marks)
        return _log_marks(self.low, self.high) if self.log else _linear_marks(self.low, self.high)


def make_axis(
    label: str,
    values: Iterable[float],
    *,
    log: bool = False,
    zero: bool = False,
    text_of: Callable[[float], str] = lambda value: f"{value:g}",
) -> Axis:
    """An axis around `values` with a little room; `zero` begins a linear one at 0. Log axes take values above 0."""
    values = [value for value in values if math.isfinite(value) and (value > 0 or not log)] or [1.0]
    low, high = min(values), max(values)
    if log:
        room = max((high / low) ** 0.04, 1.1)
        return Axis(label, low / room, high * room, True, text_of)
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return Axis(label, 0.0 if zero else low - room, high + room, False, text_of)


def _linear_marks(low: float, high: float) -> list[float]:
    rough = (high - low) / 6
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    return [round(k * step, 12) for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _log_marks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        marks = [factor * 10.0**k for k in decades for factor in factors if low <= factor * 10.0**k <= high]
        if len(marks) < 2:
            return _linear_marks(low, high)
        if len(marks) <= 7:
            return marks
    return marks[:: math.ceil(len(marks) / 7)]
