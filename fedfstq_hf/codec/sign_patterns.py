"""An update as signs see it: in units of each tensor's size, every sign flipped or not at random.

What is coded then looks like noise to any code of signs, whatever pattern the update has; and what the code gets wrong
is different in each message, so that the mean of many messages is right. A decoded coordinate is plus or minus its
tensor's magnitude, which is chosen so that the whole keeps its length in the direction of what it stands for (the
scale of Vargaftik et al. 2021, https://arxiv.org/abs/2105.08339).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch

from .coding.coordinates import Coordinates, runs
from .schema import Schema
from .update import SparseUpdate

Bool = npt.NDArray[np.bool_]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]
UInt32 = npt.NDArray[np.uint32]
Minus = Callable[[int, int], Bool]
"""Whether the coded signs `first .. last` are minus, in the order of the coordinates that are sent."""

OCTAVES = 128  # the grid of magnitudes spans 2^-80 .. 2^48
_LOWEST = -80
MAGNITUDE_STEPS = 8
"""Grid points per octave of a tensor's magnitude."""
MAGNITUDES = OCTAVES * MAGNITUDE_STEPS + 1
"""Symbols of a magnitude: 0, nothing of the tensor is sent; else 1 + grid point."""


def magnitude_grid() -> Float32:
    """All magnitudes, ascending, float32 (OCTAVES * MAGNITUDE_STEPS,): the same on every machine."""
    return _grid().copy()


@lru_cache(maxsize=1)
def _grid() -> Float32:
    mantissa = [1, 1.0905077, 1.1892071, 1.2968396, 1.4142135, 1.5422108, 1.6817929, 1.8340081]
    octave = np.array(mantissa, dtype=np.float32)
    points: Float32 = np.ldexp(octave, np.arange(_LOWEST, _LOWEST + OCTAVES)[:, None]).reshape(-1)
    return points


def nearest_magnitude(magnitudes: Float64) -> Int64:
    """Index on the grid nearest to each magnitude."""
    points = _grid().astype(np.float64)
    return np.searchsorted((points[1:] + points[:-1]) / 2, magnitudes).astype(np.int64)


def draw_seed(values: Float32, seed: int, round: int) -> int:
    """32 bits from a codec's seed, the round and the update: clients draw apart, and one draws the same again."""
    text = f"fedfstq sample {seed} {round}\n".encode()
    return int.from_bytes(hashlib.sha256(text + values.tobytes()).digest()[:4], "big")


def hashed(seed: int, start: int, end: int) -> UInt32:
    """32 bits for each of the coordinates `start .. end`.

    The finaliser of MurmurHash3 of coordinate xor seed: whole numbers only, the same on every machine.
    """
    h = np.arange(start, end, dtype=np.uint32) ^ np.uint32(seed)
    h ^= h >> np.uint32(16)
    h *= np.uint32(0x85EBCA6B)
    h ^= h >> np.uint32(13)
    h *= np.uint32(0xC2B2AE35)
    h ^= h >> np.uint32(16)
    return h


def flips(h: UInt32) -> Bool:
    """The lowest bit of a hash: whether the coordinate's sign is flipped."""
    return (h & np.uint32(1)).astype(np.bool_)


def sizes(schema: Schema, values: Float32) -> Float64:
    """Root mean square of each tensor, (tensors,); 0 for one that is not sent."""
    size = np.zeros(len(schema.tensors))
    for i, spec in enumerate(schema.tensors):
        squares = 0.0
        for start, end in runs(spec.offset, spec.offset + spec.size):
            part = values[start:end].astype(np.float64)
            squares += float(part @ part)
        # below the grid's first point a tensor would be sent larger than it is
        if spec.size and (squares / spec.size) ** 0.5 > _grid()[0]:
            size[i] = (squares / spec.size) ** 0.5
    return size


def standard(values: Float32, places: Coordinates, size: Float64, seed: int) -> Float32:
    """The coordinates of `places` in units of their tensors' sizes, flipped as the seed has it, (count,)."""
    sample = np.empty(places.count, dtype=np.float32)
    for part in places.parts:
        chosen = places.mask(part)
        scaled = values[part.start : part.end][chosen] / np.float32(size[part.tensor])
        flipped = flips(hashed(seed, part.start, part.end)[chosen])
        sample[part.first : part.last] = np.where(flipped, -scaled, scaled)
    return sample


def factors(
    places: Coordinates, sample: Float32, minus: Minus, added: float, emphasis: Float64 | None = None
) -> Float64:
    """What each tensor's signs have to be multiplied by to be as long as its sample in its direction, (tensors,).

    Where a tensor has few coordinates, chance has a large part in that: of what the whole sample is like, a share
    `added` is counted as the tensor's own.

    emphasis: how well each tensor's signs are expected to fit, relative to others', (tensors,); None for all alike.
    """
    squares, along = np.zeros(len(places.used)), np.zeros(len(places.used))
    for part in places.parts:
        piece = sample[part.first : part.last].astype(np.float64)
        squares[part.tensor] += piece @ piece
        along[part.tensor] += np.where(minus(part.first, part.last), -piece, piece).sum()
    # chance may turn a small tensor's own against it; all signs together never are
    own, whole = np.maximum(along, 0.0), along.sum()
    if whole <= 0:
        return np.zeros_like(own)
    if emphasis is None:
        emphasis = np.ones_like(own)
    expected = whole * emphasis / ((emphasis * squares).sum() / squares.sum())
    found: Float64 = (squares + added * squares.sum()) / (own + added * expected)
    return found


def reconstructed(places: Coordinates, seed: int, symbols: Int64, minus: Minus) -> SparseUpdate:
    """The update that signs stand for: of each coordinate plus or minus its tensor's magnitude.

    symbols: of the tensors' magnitudes (tensors,).
    """
    points = _grid()
    magnitude = np.where(symbols > 0, points[np.maximum(symbols - 1, 0)], np.float32(0)).astype(np.float32)
    values = places.room()
    for part in places.parts:
        down = flips(hashed(seed, part.start, part.end)[places.mask(part)])
        down ^= minus(part.first, part.last)
        values[part.first : part.last] = np.where(down, -magnitude[part.tensor], magnitude[part.tensor])
    return places.update(values)


def nothing(schema: Schema) -> SparseUpdate:
    """The update that an empty payload stands for."""
    return SparseUpdate(schema.num_params, torch.zeros(0, dtype=torch.int64, device="cpu"), torch.zeros(0))
