"""What codecs are given, as flat vectors, and which coordinates of it a decoded message carries.

A `Coordinates` holds one bit for each of the adapter's: index arrays would take twice the adapter in float32 if all are
set. Values come in coordinate order into one array, in which they are then moved to where they belong.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...errors import ConfigError, NonFiniteError
from ..schema import Schema
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


def read_delta(delta: Mapping[str, Tensor]) -> tuple[Schema, Tensor]:
    """Schema and flat CPU float32 vector of a delta. Raises NonFiniteError naming the first bad tensor."""
    schema = Schema.from_state_dict(delta)
    vector = schema.flatten(delta)
    _check_finite(schema, vector, "update")
    return schema, vector


def read_fisher(schema: Schema, fisher: Mapping[str, Tensor] | None) -> Tensor | None:
    """Flat CPU float32 Fisher, or None. Raises NonFiniteError on NaN or infinity, ConfigError on negative entries."""
    if fisher is None:
        return None
    vector = schema.flatten(fisher)
    _check_finite(schema, vector, "Fisher information")
    if vector.numel() and float(vector.min()) < 0:
        raise ConfigError("Fisher information has negative entries; expected means of squared gradients")
    return vector


def largest_magnitude(schema: Schema, state: Mapping[str, Tensor], what: str, *, signed: bool = True) -> float:
    """Largest |entry| of a state dict, without copying it.

    Raises AdapterMismatchError unless names and shapes are the schema's, NonFiniteError on NaN or infinity, and
    ConfigError on entries below 0 that are not `signed`.
    """
    schema.check(state)
    lows, highs = [], []
    for spec in schema.tensors:
        if spec.size:
            low, high = torch.aminmax(state[spec.name].detach())
            lows.append(low.float().cpu())
            highs.append(high.float().cpu())
    if not lows:
        return 0.0
    low, high = torch.stack(lows).min(), torch.stack(highs).max()
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        _check_finite(schema, schema.flatten(state), what)
    if not signed and float(low) < 0:
        raise ConfigError(f"{what} has negative entries; expected means of squared gradients")
    return max(abs(float(low)), abs(float(high)))


def _check_finite(schema: Schema, vector: Tensor, what: str) -> None:
    # one reduction on the good path: a sum of zeros is NaN exactly if an entry was NaN or infinite
    if torch.isfinite((vector * 0).sum()):
        return
    for spec in schema.tensors:
        part = vector[spec.offset : spec.offset + spec.size]
        if not bool(torch.isfinite(part).all()):
            raise NonFiniteError(
                f"{what} of tensor {spec.name!r} holds NaN or infinity in {int((~torch.isfinite(part)).sum())} of "
                f"{spec.size} entries; nothing was encoded. Lower the learning rate or skip the step"
            )
