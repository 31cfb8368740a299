"""Late updates: those of a closed round that no record names."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fedfstq_hf.federation.mailbox import UpdateRef
from fedfstq_hf.federation.record import RoundRecord


def unnamed(
    open_round: int,
    rounds_back: int,
    refs: Callable[[int], Sequence[UpdateRef]],
    record: Callable[[int], RoundRecord],
    *,
    refinements: bool = False,
) -> list[UpdateRef]:
    """Updates of the last `rounds_back` closed rounds that no record names, oldest round first.

    Args:
        refs: round -> the messages that lie there.
        record: round -> its record.
        refinements: they are second messages, which are in time for one round more.
    """
    found: list[UpdateRef] = []
    closed = open_round - refinements
    for round in range(max(closed - rounds_back, 0), closed):
        records = map(record, range(round + 1, open_round + 1))
        named = set().union(*(entry.named(round, refinements=refinements) for entry in records))
        found += [ref for ref in refs(round) if ref.client_id not in named]
    return found
