"""The encoder's side of codec `uniform`: steps, decisions and probabilities that spend a budget best.

Everything hangs on one number, the price of a bit in weighted squared error: a group's step is where one more bit saves
just that, and each coordinate takes the magnitude that costs least, error and bits together. The price is searched.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .grid import (
    CLASSES,
    FINE,
    LOWEST,
    MAX_MAGNITUDE,
    OFFSETS,
    STEPS,
    WEIGHTS,
    Float32,
    Int64,
    Levels,
    Shape,
    step_grid,
    write,
)

# step^2 = factor * price / weight. In theory 6 / ln 2 = 8.7 at a high rate; finer steps are better at a low one
_STEP_FACTOR = 6.0
_PASSES = 3
_ROUNDING = 0.35  # of the first guess: less than a half, as zeros are cheap
_TRIALS = 24
_CLOSE = 0.997  # of the budget
_AIM = 0.9985
_FINEST = 1e-4
_FINEST_PRICE = 40.0  # octaves below the mean energy: finer than float32

Float64 = npt.NDArray[np.float64]


class Found(NamedTuple):
    """A payload, the levels in it, and the price of a bit that they were chosen at."""

    payload: bytes
    levels: Levels
    price: float


def search(values: list[Float32], weights: list[Float32] | None, max_bytes: int, held: Levels | None = None) -> Found:
    """The best payload of at most `max_bytes`. values, weights: per tensor (groups, width).

    held: levels of nearby values whose steps are to stay.
    """
    energy = sum(
        float((v.astype(np.float64) ** 2 * (1.0 if weights is None else weights[i])).sum())
        for i, v in enumerate(values)
    )
    count = sum(v.size for v in values)
    nothing = _empty(values)
    if energy == 0.0 or count == 0 or max_bytes == 0:
        return Found(b"", nothing, math.inf)
    cheapest = math.log2(energy / count) - _FINEST_PRICE
    log_price = max(cheapest, math.log2(energy / count) - 16.0 * max_bytes / count)
    # (log price, bytes) of the nearest trials that are too long and that fit
    long: tuple[float, int] | None = None
    short: tuple[float, int] | None = None
    best = Found(b"", nothing, math.inf)
    for _ in range(_TRIALS):
        levels = quantise(values, weights, 2.0**log_price, held)
        payload = write(levels)
        if len(payload) > max_bytes:
            long = log_price, len(payload)
        else:
            short = log_price, len(payload)
            best = max(best, Found(payload, levels, 2.0**log_price), key=lambda one: len(one.payload))
            if len(payload) >= _CLOSE * max_bytes or log_price == cheapest:
                break
        if long and short:
            if short[0] - long[0] < _FINEST:
                break
            share = (long[1] - _AIM * max_bytes) / max(long[1] - short[1], 1)
            log_price = long[0] + min(max(share, 0.1), 0.9) * (short[0] - long[0])
        else:
            # one bit per coordinate is two octaves of the price; a little more, to come out on the other side
            gap = 16.0 * (len(payload) - _AIM * max_bytes) / count
            log_price = max(cheapest, log_price + 1.2 * gap + math.copysign(0.05, gap))
    return best


def quantise(values: list[Float32], weights: list[Float32] | None, price: float, held: Levels | None = None) -> Levels:
    """The levels that are best at a price per bit, on the steps of `held` if there are any."""
    fine, steps = _steps(values, weights, price) if held is None else (held.fine, held.steps)
    grid = step_grid(fine).astype(np.float64)
    classes, magnitudes = [], []
    for i, v in enumerate(values):
        size = np.abs(v) / grid[steps[i]][:, None]
        # a group without weight is not worth a bit
        worth = np.ones((len(v), 1)) if weights is None else weights[i].max(axis=1, keepdims=True, initial=0.0) > 0
        rounded = np.minimum(np.floor(size + _ROUNDING), MAX_MAGNITUDE)
        magnitudes.append(np.where(worth, rounded, 0).astype(np.int64))
        classes.append(_classes(magnitudes[-1]))
    for _ in range(_PASSES):
        tables = tables_of(_shapes(values, weights, magnitudes, classes, steps, grid))
        for i, v in enumerate(values):
            scale = grid[steps[i]][:, None]
            weight = (1.0 if weights is None else weights[i]) * scale**2
            magnitudes[i] = _decide(np.abs(v) / scale, weight, classes[i], tables, price)
            classes[i] = np.where(magnitudes[i].any(axis=1), classes[i], 0)
    classes = [_classes(m) for m in magnitudes]
    shapes = _shapes(values, weights, magnitudes, classes, steps, grid)
    signed = [np.where(v < 0, -m, m) for v, m in zip(values, magnitudes, strict=True)]
    return Levels(signed, classes, steps, fine, shapes)


def _steps(values: list[Float32], weights: list[Float32] | None, price: float) -> tuple[int, list[Int64]]:
    """Fine phase and steps of all groups at a price."""
    # all steps share one fine phase, so that the price moves them together and not a quarter of an octave at a time
    phase = round(32 * math.log2(_STEP_FACTOR * price))
    fine = phase % FINE
    grid, steps = step_grid(fine).astype(np.float64), []
    for i, v in enumerate(values):
        mean = np.ones(len(v)) if weights is None else weights[i].sum(axis=1, dtype=np.float64) / max(v.shape[1], 1)
        quarters = np.round(2 * np.log2(np.where(mean > 0, mean, 1.0))).astype(np.int64)
        index = phase // FINE - 4 * LOWEST - quarters
        peak = np.abs(v).max(axis=1, initial=0.0) / (MAX_MAGNITUDE - 1.5)
        steps.append(np.clip(np.maximum(index, np.searchsorted(grid, peak)), 0, STEPS - 1))
    return fine, steps


def _classes(magnitudes: Int64) -> Int64:
    """Groups by their mean magnitude, two classes per octave; 0: all zeros."""
    mean = magnitudes.sum(axis=1) / max(magnitudes.shape[1], 1)
    octaves = np.log2(np.maximum(mean, 2.0**-30))
    return np.where(mean > 0, np.clip(np.floor(2 * octaves).astype(np.int64) + 15, 1, CLASSES - 1), 0)


def _shapes(
    values: list[Float32],
    weights: list[Float32] | None,
    magnitudes: list[Int64],
    classes: list[Int64],
    steps: list[Int64],
    grid: Float64,
) -> dict[int, Shape]:
    """Probabilities and reading points of every class in use, fitted to what it holds."""
    counts = np.zeros((CLASSES, MAX_MAGNITUDE + 1))
    moment, mass = np.zeros((CLASSES, 4)), np.zeros((CLASSES, 4))
    for i, m in enumerate(magnitudes):
        scale = grid[steps[i]][:, None]
        off = np.abs(values[i]) / scale - m
        weight = np.broadcast_to((1.0 if weights is None else weights[i]) * scale**2, m.shape)
        cell = classes[i][:, None] * (MAX_MAGNITUDE + 1) + m
        counts += np.bincount(cell.reshape(-1), minlength=counts.size).reshape(counts.shape)
        cell = (classes[i][:, None] * 4 + np.minimum(m, 3)).reshape(-1)
        moment += np.bincount(cell, weights=(off * weight).reshape(-1), minlength=moment.size).reshape(moment.shape)
        mass += np.bincount(cell, weights=weight.reshape(-1), minlength=mass.size).reshape(mass.shape)
    offset = np.divide(moment, mass, out=np.zeros_like(moment), where=mass > 0)[:, 1:]
    offsets = np.clip(np.round((offset + 0.5) * OFFSETS), 0, OFFSETS - 1).astype(np.int64)
    shapes = {}
    for number in range(1, CLASSES):
        used = np.flatnonzero(counts[number])
        if used.size and used[-1] > 0:
            row = counts[number, : used[-1] + 1]
            index = np.round(-2 * np.log2(np.maximum(row, 0.2) / row.max()))
            shapes[number] = Shape(np.clip(index, 0, WEIGHTS - 1).astype(np.int64), offsets[number])
    return shapes


class Tables(NamedTuple):
    """Bits and reading points per class and magnitude, (classes, 258); bits are infinite where there is no symbol."""

    bits: Float64
    levels: Float64


def tables_of(shapes: dict[int, Shape]) -> Tables:
    """Of all classes, from those in use."""
    bits = np.full((CLASSES, MAX_MAGNITUDE + 2), np.inf)
    bits[:, 0] = 0.0
    levels = np.tile(np.arange(MAX_MAGNITUDE + 2, dtype=np.float64), (CLASSES, 1))
    for number, shape in shapes.items():
        size = len(shape.weights)
        weights = 2.0 ** (-shape.weights / 2)
        bits[number, :size] = -np.log2(weights / weights.sum())
        bits[number, 1:size] += 1.0
        levels[number, :size] = shape.levels()
    return Tables(bits, levels)


def _decide(size: Float64, weight: Float64, classes: Int64, tables: Tables, price: float) -> Int64:
    """The cheapest of the two magnitudes around each value, and 0. size: values in steps; weight: per step squared."""
    rows = classes[:, None]
    below = np.minimum(np.floor(size), MAX_MAGNITUDE).astype(np.int64)
    best = np.zeros_like(below)
    cost = weight * size**2 + price * tables.bits[rows, best]
    for candidate in (below, below + 1):
        other = weight * (size - tables.levels[rows, candidate]) ** 2 + price * tables.bits[rows, candidate]
        best = np.where(other < cost, candidate, best)
        cost = np.minimum(cost, other)
    return best


def _empty(values: list[Float32]) -> Levels:
    return Levels(
        [np.zeros(v.shape, dtype=np.int64) for v in values],
        [np.zeros(len(v), dtype=np.int64) for v in values],
        [np.zeros(len(v), dtype=np.int64) for v in values],
        0,
        {},
    )
