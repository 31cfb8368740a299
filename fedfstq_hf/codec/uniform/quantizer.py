"""Codec `uniform`: every coordinate on a uniform grid whose step follows the weights, entropy-coded.

For dense values, as in an adapter that is shared whole: the others are made for sparse changes. Source: scalar
quantisation under an entropy constraint with rate-distortion optimised decisions, as in image codecs.

A *group* is a row of a tensor seen as (smaller side, larger side): in a LoRA matrix, one component of the rank. The
payload is one ANS stream (entropy.py), read in this order; values that are all zero make an empty payload.

| symbols | model | meaning |
|---|---|---|
| 1 per group | adaptive, 32 | class; 0: the group is all zeros |
| 1 per tensor | adaptive, 2 | steps are predicted by 0: the group before, 1: the tensor before (of as many groups) |
| 1 | uniform, 16 | by how many 64ths of an octave all steps are raised |
| 1 per group not 0 | adaptive, 512 | step, on a grid of 4 per octave from 2^-80, minus its prediction, modulo 512 |
| 1 per class in use | adaptive, 256 | its largest magnitude m, less 1 |
| m + 1 per class in use | adaptive, 48 | weights of the magnitudes 0 .. m: 2^(-i/2) |
| 3 per class in use | uniform, 32 | where magnitudes 1, 2 and above are read, in 32nds of a step above m - 1/2 |
| 1 per coordinate of a group not 0 | its class's weights, signs equally likely | signed magnitude + m |

`fit` also gives its `Rounding`: the codec held still, for training through it, whose every step changes values a little
and should find the grid where it was.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...errors import BudgetError
from ..codec import CodecContext, Encoded, SparseUpdate, read_delta, read_fisher, register
from ..schema import Schema, TensorSpec
from .grid import MAX_MAGNITUDE, Float32, as_groups, assemble, is_tall, read, shape_of, step_grid
from .search import Found, search, tables_of


@dataclass(frozen=True)
class Fit:
    """An encoded adapter, and how its values were rounded."""

    encoded: Encoded
    rounding: Rounding


def fit(
    delta: Mapping[str, Tensor],
    fisher: Mapping[str, Tensor] | None = None,
    max_bytes: int | None = None,
    *,
    held: Rounding | None = None,
) -> Fit:
    """Encode; held: a rounding of nearby values whose steps are to stay. Raises as `UniformCodec.encode` does."""
    schema, vector = read_delta(delta)
    weights = read_fisher(schema, fisher)
    if max_bytes is None:
        max_bytes = schema.num_params // 2 + 64
    if max_bytes < 0:
        raise BudgetError(f"max_bytes is {max_bytes}; expected 0 or more")
    weighted = None if weights is None else _grouped(schema, weights)
    found = search(_grouped(schema, vector), weighted, max_bytes, None if held is None else held.found.levels)
    return Fit(Encoded(found.payload, assemble(schema, found.levels)), Rounding(schema, weighted, found))


class Rounding:
    """Rounds a state dict as `found` was: each coordinate to what costs least, error and bits together."""

    def __init__(self, schema: Schema, weights: list[Float32] | None, found: Found) -> None:
        self._schema, self._weights, self.found = schema, weights, found
        self._price = found.price if math.isfinite(found.price) else 0.0
        tables = tables_of(found.levels.shapes)
        self._bits = torch.from_numpy(tables.bits.astype(np.float32))
        self._points = torch.from_numpy(tables.levels.astype(np.float32))
        grid = step_grid(found.levels.fine)
        self._steps = [torch.from_numpy(grid[steps])[:, None] for steps in found.levels.steps]
        self._classes = [torch.from_numpy(classes) for classes in found.levels.classes]

    def __call__(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Float32 CPU tensors on the grid, shaped as they came."""
        return {spec.name: self._rounded(i, spec, state[spec.name]) for i, spec in enumerate(self._schema.tensors)}

    def steps(self) -> dict[str, Tensor]:
        """Distance between grid points at every coordinate, shaped as the tensors."""
        out = {}
        for spec, steps in zip(self._schema.tensors, self._steps, strict=True):
            out[spec.name] = _as_stored(spec, steps.expand(-1, shape_of(spec)[1]))
        return out

    def _rounded(self, i: int, spec: TensorSpec, tensor: Tensor) -> Tensor:
        groups, width = shape_of(spec)
        flat = tensor.detach().float().cpu()
        values = flat.reshape(width, groups).T if is_tall(spec) else flat.reshape(groups, width)
        classes, steps = self._classes[i], self._steps[i]
        size = values.abs() / steps
        weight = steps**2 if self._weights is None else torch.from_numpy(self._weights[i]) * steps**2
        bits, points = self._bits[classes], self._points[classes]
        best, cost = torch.zeros_like(size), weight * size**2 + self._price * bits[:, :1]
        below = size.floor().clamp_(max=MAX_MAGNITUDE).long()
        for candidate in (below, below + 1):
            point = points.gather(1, candidate)
            other = weight * (size - point) ** 2 + self._price * bits.gather(1, candidate)
            better = (other < cost) & (classes > 0)[:, None]
            best, cost = torch.where(better, point, best), torch.where(better, other, cost)
        return _as_stored(spec, torch.where(values < 0, -best, best) * steps)


def _grouped(schema: Schema, vector: Tensor) -> list[Float32]:
    return [as_groups(spec, vector).astype(np.float32) for spec in schema.tensors]


def _as_stored(spec: TensorSpec, values: Tensor) -> Tensor:
    return (values.T if is_tall(spec) else values).reshape(spec.shape)


@register("uniform")
class UniformCodec:
    """Entropy-coded uniform quantisation, finer where `fisher` weighs more; 4 bits a value without `max_bytes`."""

    name = "uniform"
    unbiased = False

    def encode(
        self,
        delta: Mapping[str, Tensor],
        fisher: Mapping[str, Tensor] | None = None,
        *,
        max_bytes: int | None = None,
        context: CodecContext | None = None,
    ) -> Encoded:
        """Spend the budget on the least weighted squared error. Raises BudgetError if not even zeros fit."""
        return fit(delta, fisher, max_bytes).encoded

    def decode(self, payload: bytes, schema: Schema, context: CodecContext | None = None) -> SparseUpdate:
        """The adapter. Raises MessageError on any malformed payload."""
        sides = [shape_of(spec) for spec in schema.tensors]
        if not payload:
            return SparseUpdate(schema.num_params, None, torch.zeros(schema.num_params, device="cpu"))
        return assemble(schema, read(payload, sides))
