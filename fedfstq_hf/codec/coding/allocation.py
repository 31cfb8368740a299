"""Which coordinates are worth their bits: Fisher-weighted importance, and the largest support that fits a budget."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..budget import check_empty_fits
from ..codec import SparseUpdate

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
    # one integer per candidate, score bits above position, sorts several times faster than a stable argsort
    scaled = score[candidates] / np.ldexp(1.0, np.frexp(score.max())[1])
    key = scaled.astype(np.float32).view(np.uint32).astype(np.uint64) << np.uint64(32)
    key |= np.arange(candidates.size, 0, -1, dtype=np.uint64)
    position = candidates.size - (np.sort(key)[::-1][:count] & np.uint64(0xFFFFFFFF)).astype(np.int64)
    order: Int64 = candidates[position]
    return order


def largest_fitting(size_of: Callable[[int], float], high: int, limit: float, tolerance: float, guess: int = 0) -> int:
    """Largest k in 0 .. high with size_of(k) <= limit, for a size that grows with k from 0.

    Starts near `guess`, interpolates, and stops once k is certain to a share of `tolerance`: smooth sizes need three
    or four evaluations.
    """
    low, low_size, high_size = 0, 0.0, math.inf
    step = min(guess, high) or high
    for trial in range(64):
        size = size_of(step)
        if size <= limit:
            low, low_size = step, size
        else:
            high, high_size = step - 1, size
        if high - low <= int(low * tolerance):
            break
        if math.isinf(high_size) or trial % 4 == 3:
            # growth in proportion until both sides are known; halving now and then, in case the size is not smooth
            step = (
                int(low * limit / max(low_size, 1.0) * (1 + tolerance))
                if math.isinf(high_size)
                else (low + high + 1) // 2
            )
        else:
            slope = (high_size - low_size) / (high + 1 - low)
            # aim beside the crossing, by half the tolerance, so that the bracket closes from both sides in turn
            side = 1 - tolerance / 2 if trial % 2 else 1 + tolerance / 2
            step = int((low + (limit - low_size) / max(slope, 1e-9)) * side)
        step = min(max(step, low + 1), high)
    return low


def fill(
    draft: Callable[[int], Draft], estimate: Callable[[int], float], high: int, max_bytes: int, guess: int = 0
) -> Draft:
    """The draft of most coordinates, 0 .. high, whose payload has at most `max_bytes` bytes.

    `estimate` gives payload bits without coding; exact encodings correct it, so that the bound holds to the byte.
    Raises BudgetError if not even an empty update fits.
    """
    best, best_count = draft(0), 0
    check_empty_fits(len(best.payload), max_bytes)
    count, too_many = largest_fitting(estimate, high, 8.0 * max_bytes, _TOLERANCE, guess), high + 1
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
