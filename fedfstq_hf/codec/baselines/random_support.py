"""Codec `random`: a control that sends coordinates drawn at random, with everything else as in `fstq` at one level.

The ablation "random support" of arXiv 2604.25421: what is the choice of coordinates worth? Support, magnitudes and
signs are coded as `fstq` codes them, index cost included.

Payload: one ANS stream (entropy.py), read in this order; an empty update is an empty payload.

| symbols | model | meaning |
|---|---|---|
| | see support.py | which coordinates are sent |
| non-empty tensors | adaptive, 512 | magnitude, on the grid of quantization.py with 4 steps per octave |
| sent | 1 bit each | sign (1 = negative), in coordinate order: the stream's tail |
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...errors import ConfigError
from .. import support
from ..allocation import Draft, fill
from ..dense import read_delta
from ..entropy import Adaptive, Reader, Writer
from ..quantization import OCTAVES, fit_levels, grid, nearest, steps_per_octave
from ..registry import CodecContext, Encoded, register
from ..schema import Schema
from ..support import Int64, Layout
from ..update import SparseUpdate
from .bits import draws

_STEPS = steps_per_octave(1)
_MATRIX_BITS = 4.0  # of one magnitude, by estimate


@register("random")
class RandomCodec:
    """Random support. density: share sent where no `max_bytes` is given. seed: with the round and the update."""

    name = "random"

    def __init__(self, density: float = 0.02, seed: int = 0) -> None:
        if isinstance(density, bool) or not isinstance(density, (int, float)) or not 0.0 < density <= 1.0:
            raise ConfigError(f"random density is {density!r}; expected a share above 0 and at most 1, such as 0.02")
        if type(seed) is not int:
            raise ConfigError(f"random seed is {seed!r}; expected an integer")
        self.density, self.seed = density, seed

    def encode(
        self,
        delta: Mapping[str, Tensor],
        fisher: Mapping[str, Tensor] | None = None,
        *,
        max_bytes: int | None = None,
        context: CodecContext | None = None,
    ) -> Encoded:
        """Code random non-zero coordinates; `fisher` is not used. Raises BudgetError if `max_bytes` is negative."""
        schema, vector = read_delta(delta)
        layout, values = Layout.of(schema), vector.numpy()
        order = np.argsort(draws(vector, self.seed, context.round if context else 0), kind="stable")
        order = order[values[order] != 0]

        def draft(count: int) -> Draft:
            return _draft(layout, values, np.sort(order[:count]))

        def estimate(count: int) -> float:
            columns = layout.columns_of(order[:count])[0]
            matrices = _MATRIX_BITS * min(count, layout.num_tensors)
            return support.plan(layout, columns).bits + count + matrices if count else 0.0

        if max_bytes is None:
            best = draft(max(1, round(self.density * schema.num_params)))
        else:
            best = fill(draft, estimate, order.size, max_bytes)
        return Encoded(best.payload, best.update)

    def decode(self, payload: bytes, schema: Schema, context: CodecContext | None = None) -> SparseUpdate:
        """Sparse update of at most the schema's size. Raises MessageError on any malformed payload."""
        layout = Layout.of(schema)
        if not payload:
            return _update(layout, np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32))
        reader = Reader(payload)
        places = support.read(reader, layout)
        magnitude = np.zeros(layout.num_tensors, dtype=np.float32)
        used = places.used
        magnitude[used] = grid(_STEPS)[reader.get_adaptive(int(used.sum()), Adaptive(OCTAVES * _STEPS))]
        signs, values = reader.finish(tail=places.count), places.room()
        for part in places.parts:
            negative = signs.take(part.last - part.first)
            values[part.first : part.last] = np.where(negative, -magnitude[part.tensor], magnitude[part.tensor])
        return places.update(values)


def _draft(layout: Layout, vector: npt.NDArray[np.float32], indices: Int64) -> Draft:
    if not indices.size:
        return Draft(b"", _update(layout, indices, np.zeros(0, dtype=np.float32)))
    values = vector[indices].astype(np.float64)
    tensor = layout.tensor_of(indices)
    fitted, _ = fit_levels(np.abs(values), np.ones(values.size), tensor, layout.num_tensors, 1)
    writer = Writer()
    support.write(writer, layout, indices, support.plan(layout, layout.columns_of(indices)[0]))
    used = np.bincount(tensor, minlength=layout.num_tensors) > 0
    writer.put_adaptive(nearest(fitted[used, 0], _STEPS).tolist(), Adaptive(OCTAVES * _STEPS))
    negative = values < 0
    payload = writer.finish(tail=negative)
    return Draft(payload, _update(layout, indices, _signed(fitted[tensor, 0].astype(np.float32), negative)))


def _signed(magnitude: npt.NDArray[np.float32], negative: npt.NDArray[np.bool_]) -> npt.NDArray[np.float32]:
    signed: npt.NDArray[np.float32] = np.where(negative, -magnitude, magnitude)
    return signed


def _update(layout: Layout, indices: Int64, values: npt.NDArray[np.float32]) -> SparseUpdate:
    return SparseUpdate(layout.num_params, torch.from_numpy(indices), torch.from_numpy(values))
