"""Budgets that move: few bytes while progress is cheap, more when it slows.

Written "auto" or "auto:LOW..HIGH", each bound as `parse_budget` reads it: "auto:0.05bpp..5s@2Mbps" never asks more of a
link than five seconds. Pure: the caller keeps the state and says how well training goes.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from ..errors import BudgetError
from .budget import parse_budget

_DEFAULT = "auto:0.05bpp..0.4bpp"
_SMOOTHING = 0.5  # weight of the newest signal: losses of small batches are noisy
_SLOW, _FAST = 0.5, 0.8  # progress per round, as shares of the fastest so far
_STEP = 1.5  # by which a budget grows or shrinks from one round to the next
_FADE = 0.98  # per round, of the fastest progress: one lucky start shall not count for ever


@dataclass(frozen=True)
class BudgetState:
    """What a client remembers between rounds. Plain numbers, so that it can be stored as JSON.

    num_bytes: budget of the next message. level: smoothed signal, None before the first. fastest: largest progress per
    round so far, in the signal's unit. round: of the last signal.
    """

    num_bytes: int
    level: float | None = None
    fastest: float = 0.0
    round: int = 0

    def to_dict(self) -> dict[str, int | float | None]:
        """Fields by name."""
        return asdict(self)


@dataclass(frozen=True)
class BudgetController:
    """Moves a message's budget between `low` and `high` bytes. Raises BudgetError unless 1 <= low <= high."""

    low: int
    high: int

    def __post_init__(self) -> None:
        if not 1 <= self.low <= self.high:
            raise BudgetError(
                f"an automatic budget runs from {self.low} to {self.high} bytes; expected the lower bound first, as in "
                f'"{_DEFAULT}"'
            )

    def start(self) -> BudgetState:
        """The first message is small: the first rounds are the cheapest."""
        return BudgetState(self.low)

    def after(self, state: BudgetState, signal: float, round: int) -> BudgetState:
        """The state once a signal is known.

        Args:
            state: the one before.
            signal: local training loss, or a posted metric with its sign turned so that lower is better.
            round: that it belongs to. One that is not newer than the last, or a signal that is NaN or infinite,
                changes nothing.
        """
        elapsed = round - state.round if state.level is not None else 1
        if not math.isfinite(signal) or elapsed < 1:
            return state
        if state.level is None:
            return BudgetState(self._bounded(state.num_bytes), signal, 0.0, round)
        level = state.level + _SMOOTHING * (signal - state.level)
        progress = (state.level - level) / elapsed
        fastest = max(progress, state.fastest * _FADE**elapsed)
        if progress < _SLOW * fastest or fastest <= 0:
            num_bytes = math.ceil(state.num_bytes * _STEP)
        elif progress > _FAST * fastest:
            num_bytes = math.floor(state.num_bytes / _STEP)
        else:
            num_bytes = state.num_bytes
        return BudgetState(self._bounded(num_bytes), level, fastest, round)

    def _bounded(self, num_bytes: int) -> int:
        return min(max(num_bytes, self.low), self.high)


def parse_controller(budget: str | int | None, num_params: int) -> BudgetController | None:
    """The controller that "auto" or "auto:LOW..HIGH" means for an adapter of `num_params`; None for any other budget.

    Raises BudgetError if a bound cannot be read or they stand in the wrong order.
    """
    if not isinstance(budget, str) or not (text := budget.strip()).startswith("auto"):
        return None
    return BudgetController(*parse_bounds(_DEFAULT if text == "auto" else text, "auto", num_params))


def parse_bounds(budget: str, kind: str, num_params: int) -> tuple[int, int]:
    """The two sizes in bytes of a budget written "KIND:LOW..HIGH".

    Raises BudgetError if they cannot be read or stand in the wrong order.
    """
    given, colon, bounds = budget.strip().partition(":")
    low, dots, high = bounds.partition("..")
    if given != kind or not colon or not dots:
        raise BudgetError(f'uplink budget {budget!r} cannot be read; write "{kind}:0.05bpp..0.4bpp"')
    sizes = parse_budget(low, num_params), parse_budget(high, num_params)
    if sizes[0] > sizes[1]:
        raise BudgetError(
            f"uplink budget {budget!r} runs from {sizes[0]} to {sizes[1]} bytes; write the lower bound "
            f'first, as in "{kind}:0.05bpp..0.4bpp"'
        )
    return sizes
