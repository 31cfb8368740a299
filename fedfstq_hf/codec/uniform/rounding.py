"""Codec `uniform` held still: values near those that it was fitted to, rounded at the same price to the same grid.

For training through the rounding, whose every step changes values a little and should find the grid where it was.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...errors import BudgetError
from ..coding.coordinates import read_delta, read_fisher
from ..registry import Encoded
from ..schema import Schema, TensorSpec
from .grid import MAX_MAGNITUDE, Float32, as_groups, assemble, is_tall, shape_of, step_grid
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
