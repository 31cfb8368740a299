"""Magnitudes of a sparse update: a few levels per matrix, fitted to the coordinates that carry them.

Levels live on a logarithmic grid, so that one costs a few bits and is the same float32 on every machine.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]
OCTAVES = 128  # grid spans 2^-80 .. 2^48
_LOWEST = -80
_LLOYD_STEPS = 8


def lowest_octave() -> int:
    """Binary exponent of the grid's first point."""
    return _LOWEST


def steps_per_octave(levels: int) -> int:
    """Grid resolution: a single level tolerates coarser steps than levels that lie close together."""
    return 4 if levels == 1 else 8


def grid(steps: int) -> npt.NDArray[np.float32]:
    """All magnitudes with 2, 4 or 8 steps per octave, ascending, float32 (OCTAVES * steps,)."""
    return _grid(steps).copy()


@lru_cache(maxsize=8)
def _grid(steps: int) -> npt.NDArray[np.float32]:
    mantissa = np.array([1.0905077, 1.1892071, 1.2968396, 1.4142135, 1.5422108, 1.6817929, 1.8340081], dtype=np.float32)
    octave = np.concatenate([np.ones(1, dtype=np.float32), mantissa[8 // steps - 1 :: 8 // steps]])
    points: npt.NDArray[np.float32] = np.ldexp(octave, np.arange(_LOWEST, _LOWEST + OCTAVES)[:, None]).reshape(-1)
    return points


def nearest(magnitudes: Float64, steps: int) -> Int64:
    """Index on the grid of 2, 4 or 8 steps per octave nearest to each magnitude."""
    points = grid(steps).astype(np.float64)
    return np.searchsorted((points[1:] + points[:-1]) / 2, magnitudes).astype(np.int64)


def fit_levels(
    magnitude: Float64, weight: Float64, group: Int64, num_groups: int, levels: int
) -> tuple[Float64, Int64]:
    """Levels per group that minimise sum weight * (magnitude - level)^2, and each coordinate's level number.

    magnitude, weight, group: (nnz,). Returns levels (num_groups, levels) ascending, on the grid, and numbers (nnz,).
    One level: the weighted mean. More: Lloyd-Max from a start at equal shares of the group's range of magnitudes.
    """
    mean = _weighted_mean(magnitude, weight, group, num_groups)
    if levels == 1:
        fitted = mean[:, None]
    else:
        low, high = np.full(num_groups, np.inf), np.zeros(num_groups)
        np.minimum.at(low, group, magnitude)
        np.maximum.at(high, group, magnitude)
        low = np.where(np.isfinite(low), low, 0.0)
        shares = (np.arange(levels) + 0.5) / levels
        fitted = low[:, None] + (high - low)[:, None] * shares
        for _ in range(_LLOYD_STEPS):
            number = assign(magnitude, fitted, group)
            cell = group * levels + number
            means = _weighted_mean(magnitude, weight, cell, num_groups * levels).reshape(num_groups, levels)
            used = np.bincount(cell, minlength=num_groups * levels).reshape(num_groups, levels) > 0
            fitted = np.sort(np.where(used, means, fitted), axis=1)
    steps = steps_per_octave(levels)
    fitted = grid(steps).astype(np.float64)[nearest(fitted, steps)]
    return fitted, assign(magnitude, fitted, group)


def assign(magnitude: Float64, fitted: Float64, group: Int64) -> Int64:
    """Number of the nearest level of each coordinate's group, ties to the lower one. fitted: (num_groups, levels)."""
    number = np.zeros(magnitude.shape, dtype=np.int64)
    for j in range(fitted.shape[1] - 1):
        middle = (fitted[:, j] + fitted[:, j + 1]) / 2
        number += magnitude > middle[group]
    return number


def _weighted_mean(magnitude: Float64, weight: Float64, group: Int64, num_groups: int) -> Float64:
    total = np.bincount(group, weights=weight, minlength=num_groups)
    moment = np.bincount(group, weights=weight * magnitude, minlength=num_groups)
    return np.divide(moment, total, out=np.zeros(num_groups), where=total > 0)
