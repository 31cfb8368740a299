"""Which coordinates are worth their bits: Fisher-weighted importance, and the largest support that fits a budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import BudgetError
from .update import SparseUpdate

Int64 = npt.NDArray[np.int64]
# a Fisher below this share of its largest counts as that: coordinates never seen come last, but they do come
_FISHER_FLOOR = 1e-12
_EXACT_TRIES = 8
_TOLERANCE = 0.001
_FULL = 0.99  # a payload that fills this share of the budget is not improved further


@dataclass(frozen=True)
class Draft:
    """A finished payload, and what it decodes to."""

    payload: bytes
    update: SparseUpdate


def root_weight(delta: Tensor, fisher: Tensor | None) -> Tensor:
    """sqrt(F) per coordinate, float32 (num_params,); ones without a Fisher.

    Roots, because F * delta^2 itself underflows where both are small.
    """
    if fisher is None:
        return torch.ones_like(delta)
    largest = float(fisher.max()) if fisher.numel() else 0.0
    if largest == 0.0:
        return torch.ones_like(delta)
    return fisher.clamp_min(largest * _FISHER_FLOOR).sqrt()


def strongest(score: npt.NDArray[np.floating[Any]], count: int) -> Int64:
    """Positions of the `count` highest positive scores, highest first, ties to the lower position.

    The result depends on the values alone (a library's top-k breaks ties as it pleases).
    """
    count = min(count, int(np.count_nonzero(score > 0)))
    if count <= 0:
        return np.zeros(0, dtype=np.int64)
    threshold = np.partition(score, score.size - count)[score.size - count]
    candidates = np.flatnonzero(score >= threshold)  # ascending
    order: Int64 = candidates[np.argsort(-score[candidates], kind="stable")[:count]]
    return order


def largest_fitting(low: int, high: int, size_of: Callable[[int], float], limit: float, tolerance: float) -> int:
    """Largest k in low .. high with size_of(k) <= limit, for a size that grows with k; `low` if none fits.

    Interpolates between the brackets, so that smooth sizes need few evaluations, and stops when k is certain to a
    share of `tolerance`.
    """
    if high <= low or size_of(high) <= limit:
        return high
    low_size, high_size = size_of(low), size_of(high)
    if low_size > limit:
        return low
    for step in range(64):
        if high - low <= max(1, int(low * tolerance)):
            break
        share = (limit - low_size) / max(high_size - low_size, 1e-9) if step % 3 else 0.5
        middle = min(max(low + int((high - low) * share), low + 1), high - 1)
        size = size_of(middle)
        if size <= limit:
            low, low_size = middle, size
        else:
            high, high_size = middle, size
    return low


def fill(draft: Callable[[int], Draft], estimate: Callable[[int], float], high: int, max_bytes: int) -> Draft:
    """The draft of most coordinates, 0 .. high, whose payload has at most `max_bytes` bytes.

    `estimate` gives payload bits without coding; exact encodings correct it, so that the bound holds to the byte.
    Raises BudgetError if not even an empty update fits.
    """
    best, best_count = draft(0), 0
    if len(best.payload) > max_bytes:
        raise BudgetError(
            f"an empty update takes {len(best.payload)} bytes of payload, the budget leaves {max_bytes} after the "
            f"container; raise the uplink budget by at least {len(best.payload) - max_bytes} bytes"
        )
    count, too_many = largest_fitting(0, high, estimate, 8.0 * max_bytes, _TOLERANCE), high + 1
    for _ in range(_EXACT_TRIES):
        if count <= best_count:
            break
        current = draft(count)
        size = len(current.payload)
        if size <= max_bytes:
            best, best_count = current, count
            if size >= _FULL * max_bytes:
                break
        else:
            too_many = count
        count = min(int(count * max_bytes / size) - (size > max_bytes), too_many - 1)
        if count <= best_count < too_many - 1 and size > max_bytes:
            count = (best_count + too_many) // 2
    return best
