"""Codec `fstq`: Fisher-chosen coordinates, levels fitted to them, everything entropy-coded, budget kept to the byte.

Importance is u = F * delta^2 (METHOD section 4); the support is the largest top-k of u whose coded payload fits.

Payload: one ANS stream (see entropy.py; trailing zero bytes cut), read in this order. There is no framing: counts and
alphabets follow from the schema and from what was read before.

| symbols | model | meaning |
|---|---|---|
| 1 | uniform, 16 | kind: 0, 1, 2 = 1, 2, 4 levels; 3 = empty update, nothing follows; others are refused |
| 1 | uniform, 16 | concentration of the column counts (support.CONCENTRATIONS) |
| tensors | adaptive, 48 | density class (support.DENSITIES) |
| columns | beta-binomial of the tensor | non-zeros per column |
| < height * non-empty columns | hypergeometric | which rows, row by row over all columns |
| non-empty tensors | adaptive, 512 or 1024 | lowest level, on the grid of quantization.py |
| non-empty tensors, levels - 1 times | adaptive, 1024 | step up to the next level |
| non-zeros | 1 bit each | sign (1 = negative), in coordinate order |
| levels, if > 1 | uniform, 64 | frequency weight of each level |
| non-zeros, if levels > 1 | categorical | level number, in coordinate order |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..errors import BudgetError, ConfigError, MessageError
from . import support
from .allocation import largest_fitting, root_weight, strongest
from .dense import read_delta, read_fisher
from .entropy import Adaptive, Reader, Writer, table, uniform
from .quantization import OCTAVES, Float64, fit_levels, grid, nearest, steps_per_octave
from .registry import CodecContext, Encoded, register
from .schema import Schema
from .support import Int64, Layout
from .update import SparseUpdate

_KINDS = (1, 2, 4)
_EMPTY = 3
_NUM_KINDS = 16
_WEIGHTS = 64
_EXACT_TRIES = 8
_FULL = 0.99  # a payload that fills this share of the budget is not improved further


@register("fstq")
class FstqCodec:
    """Sparse, Fisher-guided, entropy-coded.

    levels: magnitudes per matrix, "auto" (least Fisher-weighted distortion in the budget), 1 (ternary), 2 or 4.
    density: share of coordinates sent where no `max_bytes` is given.
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
        """Code the coordinates that matter most. Raises BudgetError if `max_bytes` is less than 1."""
        schema, vector = read_delta(delta)
        source = _Source(Layout.of(schema), vector, root_weight(vector, read_fisher(schema, fisher)))
        if max_bytes is not None and max_bytes < len(source.draft(0, 1).payload):
            raise BudgetError(
                f"fstq needs 1 byte of payload for even an empty update, {max_bytes} are left by the budget and the "
                "container; raise the uplink budget"
            )
        # finer levels pay, if they do, one step after the other: stop at the first that does not
        best: _Draft | None = None
        for levels in _KINDS if self.levels == "auto" else (self.levels,):
            if max_bytes is None:
                draft = source.draft(max(1, round(self.density * schema.num_params)), levels)
            else:
                draft = source.fill(max_bytes, levels)
            if best is not None and draft.saved <= best.saved:
                break
            best = draft
        if best is None:
            best = source.draft(0, 1)
        return Encoded(best.payload, best.update)

    def decode(self, payload: bytes, schema: Schema, context: CodecContext | None = None) -> SparseUpdate:
        """Sparse update of at most the schema's size. Raises MessageError on any malformed payload."""
        layout = Layout.of(schema)
        reader = Reader(payload)
        kind = int(reader.get(1, uniform(_NUM_KINDS))[0])
        if kind == _EMPTY:
            reader.finish()
            return _empty_update(layout)
        if kind >= len(_KINDS):
            raise MessageError(f"fstq payload is of kind {kind}; this version reads 0 to {_EMPTY}")
        levels = _KINDS[kind]
        indices = support.read(reader, layout)
        tensor = layout.tensor_of(indices)
        fitted = _read_levels(reader, np.bincount(tensor, minlength=layout.num_tensors) > 0, levels)
        negative = reader.get_bits(indices.size)
        number = np.zeros(indices.size, dtype=np.int64)
        if levels > 1:
            weights = reader.get(levels, uniform(_WEIGHTS))
            if not weights.any():
                raise MessageError("fstq payload gives every level the frequency 0; expected one above 0")
            number = reader.get(indices.size, table(weights.tolist())).astype(np.int64)
        reader.finish()
        return _update(layout, indices, fitted[tensor, number], negative)


@dataclass(frozen=True)
class _Draft:
    """A finished payload, what it decodes to, and the Fisher-weighted distortion that it saves over sending nothing."""

    payload: bytes
    update: SparseUpdate
    saved: float


class _Source:
    """One update to encode, its coordinates ranked by importance as far as was asked."""

    def __init__(self, layout: Layout, vector: Tensor, root: Tensor) -> None:
        self.layout = layout
        self._vector = vector
        self._root = root
        self._score = vector.abs() * root
        self._ranked = np.zeros(0, dtype=np.int64)
        self._columns = np.zeros(0, dtype=np.int64)

    def rank(self, count: int) -> int:
        """Rank the first `count` coordinates; returns how many there are (coordinates of no importance are none)."""
        if count > self._ranked.size:
            self._ranked = strongest(self._score, count)
            self._columns = self.layout.columns_of(self._ranked)[0]
        return min(count, self._ranked.size)

    def fill(self, max_bytes: int, levels: int) -> _Draft:
        """The draft with the longest prefix of the ranking whose payload has at most `max_bytes` bytes."""
        limit = 8.0 * max_bytes
        high = self.rank(min(self.layout.num_params, max(64, int(limit / 3))))
        if high < self.layout.num_params and self._estimate(high, levels) <= limit:
            high = self.rank(self.layout.num_params)
        count = largest_fitting(0, high, lambda k: self._estimate(k, levels), limit)
        # the estimate is good to a percent: correct it by exact encodings, keeping the best that fits
        best, too_many = self.draft(0, levels), high + 1
        best_count = 0
        for _ in range(_EXACT_TRIES):
            draft = self.draft(count, levels)
            size = max(len(draft.payload), 1)
            if size <= max_bytes:
                if count >= best_count:
                    best, best_count = draft, count
                if size >= _FULL * max_bytes:
                    break
            else:
                too_many = min(too_many, count)
            proposal = min(int(count * max_bytes / size) - (size > max_bytes), too_many - 1)
            if proposal <= best_count:
                break
            count = proposal
        return best

    def draft(self, count: int, levels: int) -> _Draft:
        """Encode the first `count` coordinates of the ranking."""
        writer = Writer()
        count = self.rank(count)
        if count == 0:
            writer.put([_EMPTY], uniform(_NUM_KINDS))
            return _Draft(writer.finish(), _empty_update(self.layout), 0.0)
        indices = np.sort(self._ranked[:count])
        value = self._vector.numpy()[indices].astype(np.float64)
        weight = self._root.numpy()[indices].astype(np.float64) ** 2
        tensor = self.layout.tensor_of(indices)
        fitted, number = fit_levels(np.abs(value), weight, tensor, self.layout.num_tensors, levels)
        negative = value < 0

        writer.put([_KINDS.index(levels)], uniform(_NUM_KINDS))
        support.write(writer, self.layout, indices, support.plan(self.layout, self._columns[:count]))
        _write_levels(writer, fitted[np.bincount(tensor, minlength=self.layout.num_tensors) > 0])
        writer.put_bits(negative)
        if levels > 1:
            share = np.bincount(number, minlength=levels)
            frequency = np.ceil(share * (_WEIGHTS - 1) / share.max())
            writer.put(frequency, uniform(_WEIGHTS))
            writer.put(number, table(frequency.tolist()))
        magnitude = fitted[tensor, number]
        saved = float((weight * (value**2 - (np.abs(value) - magnitude) ** 2)).sum())
        return _Draft(writer.finish(), _update(self.layout, indices, magnitude, negative), saved)

    def _estimate(self, count: int, levels: int) -> float:
        """Payload bits of the first `count` coordinates, without coding them."""
        if count == 0:
            return 4.0
        chosen = support.plan(self.layout, self._columns[:count])
        return chosen.bits + count * (1 + 0.95 * np.log2(levels)) + 4.0 * levels * min(count, self.layout.num_tensors)


def _write_levels(writer: Writer, fitted: Float64) -> None:
    """fitted: (non-empty tensors, levels), ascending along each row, on the grid."""
    levels = fitted.shape[1]
    points = nearest(fitted, levels)
    for j, steps in enumerate(np.diff(points, axis=1, prepend=0).T):
        writer.put_adaptive(steps.tolist(), _level_model(levels, j))


def _read_levels(reader: Reader, used: np.ndarray[tuple[int], np.dtype[np.bool_]], levels: int) -> Float64:
    """Levels per tensor (tensors, levels); zeros for tensors of which nothing is sent."""
    points = np.zeros((used.size, levels), dtype=np.int64)
    for j in range(levels):
        points[used, j] = reader.get_adaptive(int(used.sum()), _level_model(levels, j))
    magnitudes = grid(levels).astype(np.float64)
    points = points.cumsum(axis=1)
    if points.max(initial=0) >= magnitudes.size:
        raise MessageError(f"fstq payload names level {points.max()}; the grid ends at {magnitudes.size - 1}")
    return np.where(used[:, None], magnitudes[points], 0.0)


def _level_model(levels: int, position: int) -> Adaptive:
    return Adaptive(OCTAVES * steps_per_octave(levels) if position == 0 else 1024)


def _update(layout: Layout, indices: Int64, magnitude: Float64, negative: np.ndarray) -> SparseUpdate:  # type: ignore[type-arg]
    signed = np.where(negative, -magnitude, magnitude).astype(np.float32)
    return SparseUpdate(layout.num_params, torch.from_numpy(indices), torch.from_numpy(signed))


def _empty_update(layout: Layout) -> SparseUpdate:
    return SparseUpdate(layout.num_params, torch.zeros(0, dtype=torch.int64), torch.zeros(0))
