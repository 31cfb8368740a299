"""Single coordinates in a message: support, sign, and one of 1, 2, 4 or 8 magnitudes fitted per matrix.

| symbols | model | meaning |
|---|---|---|
| | see support.py | which coordinates |
| non-empty tensors | adaptive, 512 or 1024 | lowest level, on the grid of quantization.py |
| non-empty tensors, levels - 1 times | adaptive, 1024 | step up to the next level |
| levels, if > 1 | uniform, 64 | frequency weight of each level |
| non-zeros, if levels > 1 | categorical | level number, in coordinate order |
| non-zeros | 1 bit each | sign (1 = negative), in coordinate order, in the stream's tail |
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from ..errors import MessageError
from . import support
from .entropy import Adaptive, Bits, Reader, Writer, table, uniform
from .places import Part, Places
from .quantization import OCTAVES, Float64, fit_levels, grid, nearest, steps_per_octave
from .support import Int64, Layout

Bools = npt.NDArray[np.bool_]
Float32 = npt.NDArray[np.float32]
LEVELS = (1, 2, 4, 8)
_WEIGHTS = 64


def write(
    writer: Writer, layout: Layout, indices: Int64, values: Float64, weight: Float64, levels: int
) -> tuple[Float64, Bools]:
    """Put coordinates (ascending, at least one) into a stream, with levels fitted under their weights.

    Returns the values as they will be read, (nnz,), and the bits that belong to the stream's tail.
    """
    tensor = layout.tensor_of(indices)
    fitted, number = fit_levels(np.abs(values), weight, tensor, layout.num_tensors, levels)
    support.write(writer, layout, indices, support.plan(layout, layout.columns_of(indices)[0]))
    used = np.bincount(tensor, minlength=layout.num_tensors) > 0
    points = nearest(fitted[used], steps_per_octave(levels))
    for j, steps in enumerate(np.diff(points, axis=1, prepend=0).T):
        writer.put_adaptive(steps.tolist(), _level_model(levels, j))
    if levels > 1:
        share = np.bincount(number, minlength=levels)
        frequency = np.ceil(share * (_WEIGHTS - 1) / share.max())
        writer.put(frequency, uniform(_WEIGHTS))
        writer.put(number, table(frequency.tolist()))
    negative = values < 0
    magnitude = fitted[tensor, number]
    return np.where(negative, -magnitude, magnitude), negative


class Coordinates:
    """Coordinates as they stand in a message, in a byte or two for each.

    places: which they are. fitted: levels, float32 (tensors, levels). number: level of each, uint8 (nnz,).
    """

    def __init__(self, places: Places, fitted: Float32, number: npt.NDArray[np.uint8]) -> None:
        self.places, self._fitted, self._number = places, fitted, number

    def values(self, signs: Bits) -> Iterator[tuple[Part, Float32]]:
        """Their values part by part, with the signs of the tail."""
        for part in self.places.parts:
            magnitude = self._fitted[part.tensor][self._number[part.first : part.last]]
            yield part, np.where(signs.take(magnitude.size), -magnitude, magnitude)


def read(reader: Reader, layout: Layout, levels: int) -> Coordinates:
    """Coordinates, signs still missing. Raises MessageError if malformed."""
    places = support.read(reader, layout)
    fitted = _read_levels(reader, places.used, levels)
    number = np.zeros(places.count, dtype=np.uint8)
    if levels > 1:
        weights = reader.get(levels, uniform(_WEIGHTS))
        if not weights.any():
            raise MessageError("payload gives every level the frequency 0; expected one above 0")
        reader.fill(number, table(weights.tolist()))
    return Coordinates(places, fitted, number)


def none(layout: Layout) -> Coordinates:
    """No coordinates at all."""
    places = Places(np.zeros(layout.num_params, dtype=np.bool_), layout.offsets)
    return Coordinates(places, np.zeros((layout.num_tensors, 1), dtype=np.float32), np.zeros(0, dtype=np.uint8))


def _read_levels(reader: Reader, used: Bools, levels: int) -> Float32:
    """Levels per tensor (tensors, levels); zeros for tensors of which nothing is sent."""
    points = np.zeros((used.size, levels), dtype=np.int64)
    for j in range(levels):
        points[used, j] = reader.get_adaptive(int(used.sum()), _level_model(levels, j))
    magnitudes = grid(steps_per_octave(levels))
    points = points.cumsum(axis=1)
    if points.max(initial=0) >= magnitudes.size:
        raise MessageError(f"payload names level {points.max()}; the grid ends at {magnitudes.size - 1}")
    return np.where(used[:, None], magnitudes[points], np.float32(0.0))


def _level_model(levels: int, position: int) -> Adaptive:
    return Adaptive(OCTAVES * steps_per_octave(levels) if position == 0 else 1024)
