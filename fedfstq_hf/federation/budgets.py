"""How large each of a client's messages may be: fixed, growing over the rounds, or as large as training asks for.

`"96kB"`, `"0.3bpp"` and `"5s@2Mbps"` are fixed; `"ramp:LOW..HIGH"` grows by the same factor from round to round,
`"late:LOW..HIGH"` once, for the last quarter of the rounds; `"auto"` and `"auto:LOW..HIGH"` grow as progress slows.
Bounds are written like fixed budgets, so that `"auto:0.05bpp..5s@2Mbps"` never asks more of a slow link than five
seconds. `"round:"` before any of these makes it the budget of all messages of a round together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fedfstq_hf.codec import parse_budget
from fedfstq_hf.codec.controller import BudgetController, BudgetState, parse_bounds, parse_controller
from fedfstq_hf.errors import BudgetError
from fedfstq_hf.federation.record import RoundRecord

_KEY = "budget"
_SHARED = "round:"


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


def expected_messages(record: RoundRecord, first: int) -> int:
    """How many messages the round that `record` opens will have: as many as the last one took in.

    Args:
        first: how many to expect before there was a round, or after a rollback. Rather too few than too many: noise
            of the first rounds is not made good later.
    """
    return len(record.accepted) or first


def posted_losses(metrics: Mapping[int, Mapping[str, Mapping[str, Any]]]) -> list[tuple[int, float]]:
    """(round, mean `eval_loss` over the sources that posted one), oldest first.

    Args:
        metrics: as `Mailbox.read_metrics` returns them.
    """
    losses = []
    for round in sorted(metrics):
        values = [source.get("eval_loss") for source in metrics[round].values()]
        numbers = [float(value) for value in values if isinstance(value, (int, float))]
        if numbers:
            losses.append((round, sum(numbers) / len(numbers)))
    return losses


def _dump(state: BudgetState) -> Tensor:
    level = torch.nan if state.level is None else state.level
    return torch.tensor([state.num_bytes, level, state.fastest, state.round], dtype=torch.float64)


def _load(carried: Mapping[str, Tensor]) -> BudgetState | None:
    if _KEY not in carried:
        return None
    num_bytes, level, fastest, round = carried[_KEY].tolist()
    return BudgetState(int(num_bytes), None if level != level else level, fastest, int(round))
