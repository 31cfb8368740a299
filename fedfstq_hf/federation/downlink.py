"""What a client downloads to hold Θ_t: the packed changes since the adapter it holds, or the whole adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fedfstq_hf.federation.record import RoundRecord


@dataclass(frozen=True)
class Download:
    """`changes` are the rounds whose packed change is applied in order; None stands for the whole adapter file.

    `num_bytes` counts the control variate, where the round has one, too.
    """

    changes: tuple[int, ...] | None
    num_bytes: int


def cheapest_download(held: int | None, wanted: int, record: Callable[[int], RoundRecord]) -> Download:
    """The cheaper of the two ways from round `held` (None: nothing) to round `wanted`, in bytes."""
    whole, variate = record(wanted).adapter_bytes, record(wanted).variate_bytes
    if held is not None and held <= wanted:
        rounds, total = tuple(range(held + 1, wanted + 1)), 0
        for round in rounds:
            size = record(round).update_bytes
            total += whole if size is None else size
            if total >= whole:
                return Download(None, whole + variate)
        return Download(rounds, total + variate)
    return Download(None, whole + variate)
