"""How large each of a client's messages may be: fixed, growing over the rounds, or as large as training asks for.

`"96kB"`, `"0.3bpp"` (bits per parameter) and `"5s@2Mbps"` (time on a link) are fixed; decimal units throughout.
`"ramp:LOW..HIGH"` grows by the same factor from round to round, `"late:LOW..HIGH"` once, for the last quarter of the
rounds; `"auto"` and `"auto:LOW..HIGH"` grow as progress slows. Bounds are written like fixed budgets, so that
`"auto:0.05bpp..5s@2Mbps"` never asks more of a slow link than five seconds. `"round:"` before any of these makes it the
budget of all messages of a round together. Pure: who asks keeps the state, and says how well training goes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from decimal import Decimal

import torch
from torch import Tensor

from ..errors import BudgetError

_NUMBER = r"(\d{1,15}(?:\.\d{1,9})?)"
_BYTES = re.compile(rf"{_NUMBER}\s*(B|kB|KB|MB|GB)?")
_PER_PARAM = re.compile(rf"{_NUMBER}\s*bpp")
_LINK = re.compile(rf"{_NUMBER}\s*(ms|s|min)\s*@\s*{_NUMBER}\s*(bps|kbps|Mbps|Gbps)")
_BYTE_UNITS = {None: 1, "B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_TIME_UNITS = {"ms": Decimal("0.001"), "s": Decimal(1), "min": Decimal(60)}
_RATE_UNITS = {"bps": 1, "kbps": 10**3, "Mbps": 10**6, "Gbps": 10**9}
_FORMS = 'write bytes ("96kB" or 96000), bits per parameter ("0.3bpp") or time on a link ("5s@2Mbps")'
_DEFAULT = "auto:0.05bpp..0.4bpp"
_SMOOTHING = 0.5  # weight of the newest signal: losses of small batches are noisy
_SLOW, _FAST = 0.5, 0.8  # progress per round, as shares of the fastest so far
_STEP = 1.5  # by which a budget grows or shrinks from one round to the next
_FADE = 0.98  # per round, of the fastest progress: one lucky start shall not count for ever
_KEY = "budget"
_SHARED = "round:"


def parse_budget(budget: str | int, num_params: int) -> int:
    """Whole bytes (rounded down) of one message for an adapter of `num_params` coordinates.

    "96kB" -> 96000; "0.3bpp" -> 0.3 * num_params / 8; "5s@2Mbps" -> 5 * 2e6 / 8. Raises BudgetError if it cannot be
    read or comes to less than one byte.
    """
    if isinstance(budget, bool) or not isinstance(budget, (str, int)):
        raise BudgetError(f"uplink budget {budget!r} is a {type(budget).__name__}; {_FORMS}")
    size = budget if isinstance(budget, int) else _parse(budget.strip(), num_params)
    if size < 1:
        raise BudgetError(f"uplink budget {budget!r} comes to {size} bytes for {num_params} parameters; {_FORMS}")
    return size


def check_empty_fits(size: int, max_bytes: int) -> None:
    """Raise BudgetError if an empty update, of `size` payload bytes, exceeds the budget: then nothing fits."""
    if size > max_bytes:
        raise BudgetError(
            f"an empty update takes {size} bytes of payload, the budget leaves {max_bytes} after the container; raise "
            f"the uplink budget by at least {size - max_bytes} bytes"
        )


def _parse(text: str, num_params: int) -> int:
    if match := _BYTES.fullmatch(text):
        return int(Decimal(match[1]) * _BYTE_UNITS[match[2]])
    if match := _PER_PARAM.fullmatch(text):
        return int(Decimal(match[1]) * num_params / 8)
    if match := _LINK.fullmatch(text):
        seconds, rate = Decimal(match[1]) * _TIME_UNITS[match[2]], Decimal(match[3]) * _RATE_UNITS[match[4]]
        return int(seconds * rate / 8)
    raise BudgetError(f"uplink budget {text!r} cannot be read; {_FORMS}")


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


@dataclass(frozen=True)
class MessageBudget:
    """The sizes of a client's messages. At most one of the first four is set; none is no limit.

    Attributes:
        fixed: bytes of every message.
        ramp: bytes of the first and of the last round's message.
        late: bytes of the messages of the first three quarters of the rounds, and of the last quarter.
        controller: moves the size between bounds.
        shared: these sizes are of all messages of a round together.
    """

    fixed: int | None = None
    ramp: tuple[int, int] | None = None
    late: tuple[int, int] | None = None
    controller: BudgetController | None = None
    shared: bool = False

    def least(self, messages: int = 1) -> int | None:
        """Bytes of the smallest message it may ask for where a round has so many; None for no limit."""
        bounds = self.ramp or self.late
        least = self.controller.low if self.controller else bounds[0] if bounds else self.fixed
        return self._of_one(least, messages)

    def take(
        self,
        round: int,
        rounds: int,
        *,
        loss: float | None = None,
        posted: Sequence[tuple[int, float]] = (),
        messages: int = 1,
        carried: Mapping[str, Tensor],
    ) -> tuple[int | None, dict[str, Tensor]]:
        """Bytes of the message of `round`, and what the session must carry for the next one.

        Args:
            round: from 0.
            rounds: of the whole federation.
            loss: this client's mean training loss in `round`.
            posted: (round, loss) of evaluations that everybody can read, oldest first; they go before the client's
                own losses, which are noisy and, for a client that is seldom asked, rare.
            messages: that `round` is expected to have; they share a budget that is the round's.
            carried: what the session carries.
        """
        size, moved = self._size(round, rounds, loss, posted, carried)
        return self._of_one(size, messages), moved

    def _of_one(self, size: int | None, messages: int) -> int | None:
        return size if size is None or not self.shared else max(1, size // messages)

    def _size(
        self,
        round: int,
        rounds: int,
        loss: float | None,
        posted: Sequence[tuple[int, float]],
        carried: Mapping[str, Tensor],
    ) -> tuple[int | None, dict[str, Tensor]]:
        if self.ramp is not None:
            first, last = self.ramp
            share = round / (rounds - 1) if rounds > 1 else 1.0
            return int(first * (last / first) ** share), {}
        if self.late is not None:
            return self.late[4 * (round + 1) > 3 * rounds], {}
        if self.controller is None:
            return self.fixed, {}
        if posted:
            state = self.controller.start()
            for when, value in posted:
                state = self.controller.after(state, value, when)
            return state.num_bytes, {}
        state = _load(carried) or self.controller.start()
        if loss is not None:
            state = self.controller.after(state, loss, round)
        return state.num_bytes, {_KEY: _dump(state)}


@dataclass(frozen=True)
class Budgets:
    """Of a client's first message of a round, and of its refinement, where the federation has refinements."""

    first: MessageBudget
    refinement: MessageBudget = MessageBudget()


def open_refinement_budget(budget: str | int | None, num_params: int) -> MessageBudget:
    """Read the budget of refinements. Raises `BudgetError` where `open_budget` would, and where it follows losses."""
    opened = open_budget(budget, num_params)
    if opened.controller is not None:
        raise BudgetError(f"refinement_budget {budget!r} cannot follow the loss: give a size, such as 0.4bpp")
    return opened


def check_budget(budget: str | int, *, refinement: bool = False) -> None:
    """Raise `BudgetError` unless the budget can be read for an adapter of some size.

    Which bound is the lower one, `0.05bpp` or `96kB`, depends on that size.
    """
    for power in range(3, 13):
        try:
            (open_refinement_budget if refinement else open_budget)(budget, 10**power)
            return
        except BudgetError:
            if power == 12:
                raise


def open_budget(budget: str | int | None, num_params: int) -> MessageBudget:
    """Read a budget as people write it, for an adapter of `num_params`.

    Raises:
        BudgetError: it cannot be read, a bound comes to less than a byte, or the bounds stand in the wrong order.
    """
    if budget is None:
        return MessageBudget()
    if isinstance(budget, str) and budget.strip().startswith(_SHARED):
        whole = budget.strip().removeprefix(_SHARED)
        if whole.startswith(_SHARED):
            raise BudgetError(f'uplink budget {budget!r} says "{_SHARED}" twice; write "{_SHARED}1bpp"')
        return replace(open_budget(whole, num_params), shared=True)
    if isinstance(budget, str) and budget.strip().startswith("ramp"):
        return MessageBudget(ramp=parse_bounds(budget, "ramp", num_params))
    if isinstance(budget, str) and budget.strip().startswith("late"):
        return MessageBudget(late=parse_bounds(budget, "late", num_params))
    controller = parse_controller(budget, num_params)
    if controller is not None:
        return MessageBudget(controller=controller)
    return MessageBudget(fixed=parse_budget(budget, num_params))


def _dump(state: BudgetState) -> Tensor:
    level = torch.nan if state.level is None else state.level
    return torch.tensor([state.num_bytes, level, state.fastest, state.round], dtype=torch.float64)


def _load(carried: Mapping[str, Tensor]) -> BudgetState | None:
    if _KEY not in carried:
        return None
    num_bytes, level, fastest, round = carried[_KEY].tolist()
    return BudgetState(int(num_bytes), None if level != level else level, fastest, int(round))
