"""Which coordinates a decoded message carries, one bit for each of the adapter, and the update that their values make.

Index arrays would take twice the adapter in float32 if all are set. Values come in coordinate order into one
array, in which they are then moved to where they belong.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ..update import SparseUpdate

RUN = 1 << 15  # coordinates worked on at a time
# an index and a value take three times the room of a value
_DENSE = 3


@dataclass(frozen=True)
class Part:
    """Coordinates `start .. end` of one tensor, in which the values `first .. last` lie."""

    tensor: int
    start: int
    end: int
    first: int
    last: int


class Coordinates:
    """Coordinates of a message. mask: bool (num_params,). offsets: first coordinate of each tensor, and the end."""

    def __init__(self, mask: npt.NDArray[np.bool_], offsets: npt.NDArray[np.int64]) -> None:
        self._num_params = mask.size
        self._packed = np.packbits(mask, bitorder="little")
        self.parts: list[Part] = []
        self.used = np.zeros(len(offsets) - 1, dtype=np.bool_)  # tensors that have any
        first = 0
        for tensor, (begin, stop) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
            for start, end in runs(begin, stop):
                last = first + int(np.count_nonzero(mask[start:end]))
                if last > first:
                    self.parts.append(Part(tensor, start, end, first, last))
                    self.used[tensor] = True
                first = last
        self.count = first

    @property
    def dense(self) -> bool:
        """Whether all coordinates take less room than those that are set with their indices."""
        return _DENSE * self.count > self._num_params

    def mask(self, part: Part) -> npt.NDArray[np.bool_]:
        """Which coordinates of a part are set, (end - start,)."""
        bits = np.unpackbits(self._packed[part.start // 8 : -(-part.end // 8)], bitorder="little")
        return bits[part.start % 8 :][: part.end - part.start].view(np.bool_)

    def room(self) -> npt.NDArray[np.float32]:
        """An array for values, the first `count` of it in coordinate order; with more room if the update is dense."""
        return np.zeros(self._num_params if self.dense else self.count, dtype=np.float32)

    def indices(self) -> npt.NDArray[np.int64]:
        """Ascending coordinates (count,)."""
        indices = np.empty(self.count, dtype=np.int64)
        for part in self.parts:
            indices[part.first : part.last] = np.flatnonzero(self.mask(part)) + part.start
        return indices

    def update(self, values: npt.NDArray[np.float32]) -> SparseUpdate:
        """The update whose values stand in an array that `room` made, which is used up."""
        if not self.dense:
            return SparseUpdate(self._num_params, torch.from_numpy(self.indices()), torch.from_numpy(values))
        end = self._num_params
        # backwards: values only move up, so that none is overwritten before it is read
        for part in reversed(self.parts):
            moved = values[part.first : part.last].copy()
            values[part.start : end] = 0
            values[part.start : part.end][self.mask(part)] = moved
            end = part.start
        values[:end] = 0
        return SparseUpdate(self._num_params, None, torch.from_numpy(values))


def runs(start: int, end: int) -> Iterator[tuple[int, int]]:
    """`start .. end` in pieces."""
    for begin in range(start, end, RUN):
        yield begin, min(begin + RUN, end)
