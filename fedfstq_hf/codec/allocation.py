"""Which coordinates are worth their bits: Fisher-weighted importance, and the largest support that fits a budget."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Int64 = npt.NDArray[np.int64]
# a Fisher below this share of its largest entry counts as this share: unseen coordinates come last, but they do come
_FISHER_FLOOR = 1e-12


def root_weight(delta: Tensor, fisher: Tensor | None) -> Tensor:
    """sqrt(F) per coordinate, float32 (num_params,); ones without a Fisher. Roots keep small F * delta^2 from underflow."""
    if fisher is None:
        return torch.ones_like(delta)
    largest = float(fisher.max()) if fisher.numel() else 0.0
    if largest == 0.0:
        return torch.ones_like(delta)
    return fisher.clamp_min(largest * _FISHER_FLOOR).sqrt()


def strongest(score: Tensor, count: int) -> Int64:
    """Indices of the `count` highest positive scores, highest first, ties to the lower index.

    The result depends on the values alone (library top-k breaks ties as it pleases).
    """
    count = min(count, int((score > 0).sum()))
    if count <= 0:
        return np.zeros(0, dtype=np.int64)
    threshold = torch.topk(score, count, sorted=False).values.min()
    candidates = torch.nonzero(score >= threshold).reshape(-1)  # ascending
    order = torch.sort(score[candidates], descending=True, stable=True).indices[:count]
    chosen: Int64 = candidates[order].numpy()
    return chosen


def largest_fitting(low: int, high: int, size_of: Callable[[int], float], limit: float) -> int:
    """Largest k in low .. high with size_of(k) <= limit, for a size that grows with k; `low` if none fits.

    Interpolates between the brackets, so that smooth sizes need few evaluations.
    """
    if high <= low or size_of(high) <= limit:
        return high
    low_size, high_size = size_of(low), size_of(high)
    if low_size > limit:
        return low
    for step in range(64):
        if high - low <= max(1, low // 1000):
            break
        share = (limit - low_size) / max(high_size - low_size, 1e-9) if step % 3 else 0.5
        middle = min(max(low + int((high - low) * share), low + 1), high - 1)
        size = size_of(middle)
        if size <= limit:
            low, low_size = middle, size
        else:
            high, high_size = middle, size
    return low
