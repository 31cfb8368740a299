"""Late updates: those of a closed round that no record names."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from fedfstq_hf.federation.mailbox.protocol import UpdateRef
from fedfstq_hf.federation.record import RoundRecord

LOOK_BACK = 8
"""Closed rounds that each new record looks at for messages that came too late; the last record looks at all."""


def unnamed(
    open_round: int,
    rounds_back: int,
    refs: Callable[[int, Collection[str]], Sequence[UpdateRef]],
    record: Callable[[int], RoundRecord],
    *,
    refinements: bool = False,
) -> list[UpdateRef]:
    """Updates of the last `rounds_back` closed rounds that no record names, oldest round first.

    Args:
        refs: round and clients to leave out -> the messages of others that lie there.
        record: round -> its record; each is asked for once.
        refinements: they are second messages, which are in time for one round more.
    """
    closed = open_round - refinements
    named: dict[int, set[str]] = {round: set() for round in range(max(closed - rounds_back, 0), closed)}
    for number in range(min(named, default=open_round) + 1, open_round + 1):
        entry = record(number)
        for round, clients in named.items():
            if round < number:
                clients |= entry.named(round, refinements=refinements)
    return [ref for round, clients in named.items() for ref in refs(round, clients)]
