"""Codec `fstq`: Fisher-chosen coordinates, levels fitted to them, everything entropy-coded, budget kept to the byte.

Coordinates are ranked by Fisher-weighted distortion saved per bit (selection.py; it starts from the paper's importance
u = F * delta^2), and as many are sent as fit.

Payload: one ANS stream (see entropy.py; trailing zero bytes cut), read in this order. There is no framing: counts and
alphabets follow from the schema and from what was read before.

| symbols | model | meaning |
|---|---|---|
| 1 | uniform, 4 | kind: 0, 1, 2 = 1, 2, 4 levels; 3 is refused |
| 1 | uniform, 16 | concentration of the column counts (support.CONCENTRATIONS) |
| tensors | adaptive, 48 | density class (support.DENSITIES): all with strided columns, then all others |
| columns | beta-binomial of the tensor | non-zeros per column |
| < height * non-empty columns | hypergeometric | which rows, row by row over all columns |
| non-empty tensors | adaptive, 512 or 1024 | lowest level, on the grid of quantization.py |
| non-empty tensors, levels - 1 times | adaptive, 1024 | step up to the next level |
| levels, if > 1 | uniform, 64 | frequency weight of each level |
| non-zeros, if levels > 1 | categorical | level number, in coordinate order |
| non-zeros | 1 bit each | sign (1 = negative), in coordinate order: the stream's tail |

An empty update is an empty payload.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import ConfigError, MessageError
from . import support
from .allocation import Draft, fill, root_weight
from .dense import read_delta, read_fisher
from .entropy import Adaptive, Reader, Writer, table, uniform
from .quantization import OCTAVES, Float64, fit_levels, grid, nearest, steps_per_octave
from .registry import CodecContext, Encoded, register
from .schema import Schema
from .selection import Selector
from .support import Int64, Layout
from .update import SparseUpdate

Bools = npt.NDArray[np.bool_]
_KINDS = (1, 2, 4)
_NUM_KINDS = 4
_WEIGHTS = 64
_PROMISING = 0.95  # share of the distortion saved so far at which another number of levels is tried in full


@register("fstq")
class FstqCodec:
    """Sparse, Fisher-guided, entropy-coded.

    levels: magnitudes per matrix, "auto" (least Fisher-weighted distortion in the budget; 1 without a budget), 1
    (ternary), 2 or 4. density: share of coordinates sent where no `max_bytes` is given.
    """

    name = "fstq"

    def __init__(self, levels: Literal["auto", 1, 2, 4] = "auto", density: float = 0.02) -> None:
        if levels != "auto" and levels not in _KINDS:
            raise ConfigError(f'fstq levels is {levels!r}; expected "auto", 1, 2 or 4')
        if isinstance(density, bool) or not isinstance(density, (int, float)) or not 0.0 < density <= 1.0:
            raise ConfigError(f"fstq density is {density!r}; expected a share above 0 and at most 1, such as 0.02")
        self.levels = levels
        self.density = density

    def encode(
        self,
        delta: Mapping[str, Tensor],
        fisher: Mapping[str, Tensor] | None = None,
        *,
        max_bytes: int | None = None,
        context: CodecContext | None = None,
    ) -> Encoded:
        """Code the coordinates that matter most. Raises BudgetError if `max_bytes` is negative."""
        schema, vector = read_delta(delta)
        layout = Layout.of(schema)
        root = root_weight(vector, read_fisher(schema, fisher))
        count = max(1, round(self.density * schema.num_params)) if max_bytes is None else None
        limit = None if max_bytes is None else 8.0 * max_bytes
        selector = Selector(layout, vector, root, limit=limit, count=count)
        first, *others = (self.levels,) if self.levels != "auto" else _KINDS if max_bytes is not None else _KINDS[:1]
        levels, ranking = first, selector.rank(first)
        for more in others:
            # finer levels pay, if they do, one step after the other: stop at the first that does not
            if selector.saved(ranking, more) < _PROMISING * ranking.saved:
                break
            candidate = selector.rank(more, ranking)
            if candidate.saved <= ranking.saved:
                break
            levels, ranking = more, candidate

        def draft(count: int) -> Draft:
            return _draft(layout, vector, selector, ranking.order[:count], levels)

        def estimate(count: int) -> float:
            return selector.estimate(ranking.order[:count], levels)

        best = (
            draft(ranking.count)
            if max_bytes is None
            else fill(draft, estimate, ranking.order.size, max_bytes, ranking.count)
        )
        return Encoded(best.payload, best.update)

    def decode(self, payload: bytes, schema: Schema, context: CodecContext | None = None) -> SparseUpdate:
        """Sparse update of at most the schema's size. Raises MessageError on any malformed payload."""
        layout = Layout.of(schema)
        if not payload:
            return _empty_update(layout)
        reader = Reader(payload)
        kind = int(reader.get(1, uniform(_NUM_KINDS))[0])
        if kind >= len(_KINDS):
            raise MessageError(f"fstq payload is of kind {kind}; this version reads 0 to {len(_KINDS) - 1}")
        levels = _KINDS[kind]
        indices = support.read(reader, layout)
        tensor = layout.tensor_of(indices)
        fitted = _read_levels(reader, np.bincount(tensor, minlength=layout.num_tensors) > 0, levels)
        number = np.zeros(indices.size, dtype=np.int64)
        if levels > 1:
            weights = reader.get(levels, uniform(_WEIGHTS))
            if not weights.any():
                raise MessageError("fstq payload gives every level the frequency 0; expected one above 0")
            number = reader.get(indices.size, table(weights.tolist())).astype(np.int64)
        negative = reader.finish(tail=indices.size).astype(bool)
        return _update(layout, indices, fitted[tensor, number], negative)


def _draft(layout: Layout, vector: Tensor, selector: Selector, order: Int64, levels: int) -> Draft:
    """Encode the given candidates."""
    if not order.size:
        return Draft(b"", _empty_update(layout))
    order = np.sort(order)
    indices, columns, weight = selector.indices[order], selector.columns[order], selector.weight[order]
    value = vector.numpy()[indices].astype(np.float64)
    tensor = layout.tensor_of(indices)
    fitted, number = fit_levels(np.abs(value), weight, tensor, layout.num_tensors, levels)

    writer = Writer()
    writer.put([_KINDS.index(levels)], uniform(_NUM_KINDS))
    support.write(writer, layout, indices, support.plan(layout, columns))
    _write_levels(writer, fitted[np.bincount(tensor, minlength=layout.num_tensors) > 0])
    if levels > 1:
        share = np.bincount(number, minlength=levels)
        frequency = np.ceil(share * (_WEIGHTS - 1) / share.max())
        writer.put(frequency, uniform(_WEIGHTS))
        writer.put(number, table(frequency.tolist()))
    negative = value < 0
    return Draft(writer.finish(tail=negative), _update(layout, indices, fitted[tensor, number], negative))


def _write_levels(writer: Writer, fitted: Float64) -> None:
    """fitted: (non-empty tensors, levels), ascending along each row, on the grid."""
    levels = fitted.shape[1]
    points = nearest(fitted, steps_per_octave(levels))
    for j, steps in enumerate(np.diff(points, axis=1, prepend=0).T):
        writer.put_adaptive(steps.tolist(), _level_model(levels, j))


def _read_levels(reader: Reader, used: Bools, levels: int) -> Float64:
    """Levels per tensor (tensors, levels); zeros for tensors of which nothing is sent."""
    points = np.zeros((used.size, levels), dtype=np.int64)
    for j in range(levels):
        points[used, j] = reader.get_adaptive(int(used.sum()), _level_model(levels, j))
    magnitudes = grid(steps_per_octave(levels)).astype(np.float64)
    points = points.cumsum(axis=1)
    if points.max(initial=0) >= magnitudes.size:
        raise MessageError(f"fstq payload names level {points.max()}; the grid ends at {magnitudes.size - 1}")
    return np.where(used[:, None], magnitudes[points], 0.0)


def _level_model(levels: int, position: int) -> Adaptive:
    return Adaptive(OCTAVES * steps_per_octave(levels) if position == 0 else 1024)


def _update(layout: Layout, indices: Int64, magnitude: Float64, negative: Bools) -> SparseUpdate:
    signed = np.where(negative, -magnitude, magnitude).astype(np.float32)
    return SparseUpdate(layout.num_params, torch.from_numpy(indices), torch.from_numpy(signed))


def _empty_update(layout: Layout) -> SparseUpdate:
    return SparseUpdate(layout.num_params, torch.zeros(0, dtype=torch.int64), torch.zeros(0))
