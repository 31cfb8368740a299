"""Which coordinates a message carries: a model of the support of LoRA updates, at cost linear in columns and non-zeros.

A LoRA factor has r rows (the rank) and many columns (features). Updates cluster in few matrices and few columns, so
each column's number of non-zeros is coded under a beta-binomial whose density belongs to the matrix and whose
concentration to the message; which of the r rows they are is coded as equally likely.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from ..codec import Coordinates, runs
from ..schema import Schema
from .entropy import Adaptive, Reader, Writer, coin, table, uniform

Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]
_MAX_HEIGHT = 32
# densities 0.9 * 2^(-i/2); the last class stands for an empty matrix
_ROOT_HALF = 0.7071067811865476
DENSITIES = tuple(math.ldexp(0.9 * _ROOT_HALF if i % 2 else 0.9, -(i // 2)) for i in range(48))
# beta-binomial concentration a + b: low is clumpy, high is binomial
CONCENTRATIONS = (1.0, 1.5, 2.25, 3.5, 5.0, 7.5, 11.0, 16.0, 24.0, 36.0, 56.0, 90.0, 160.0, 400.0, 2000.0, 1e6)
_COST_UNIT = 1 << 10  # code lengths are compared as integers, in 1/1024 bit


@dataclass(frozen=True)
class Layout:
    """Coordinates of a schema as columns of small height. All arrays are per tensor, int64."""

    num_params: int
    offsets: Int64  # first coordinate; one more entry than tensors
    heights: Int64  # rows of a column, 1 .. 32
    strides: Int64  # distance between rows of a column, in coordinates
    features: Int64  # columns per block of `height` rows
    columns: Int64  # first column; one more entry than tensors

    @classmethod
    def of(cls, schema: Schema) -> Layout:
        """Columns run along the rank dimension (the smaller one); vectors are cut into runs of up to 16."""
        heights, strides, features = [], [], []
        for spec in schema.tensors:
            rows = spec.shape[0] if spec.shape else 1
            width = spec.size // max(rows, 1)
            if rows < 2 or width < 2:
                height = next(h for h in (16, 8, 4, 2, 1) if spec.size % h == 0)
                stride, feature = 1, 1
            elif rows <= width:  # (r, in): a column's rows lie `width` apart
                height, stride, feature = _divisor(rows), width, width
            else:  # (out, r): a column is contiguous
                height, stride, feature = _divisor(width), 1, 1
            heights.append(height)
            strides.append(stride)
            features.append(feature)
        sizes = [spec.size for spec in schema.tensors]
        counts = [size // height for size, height in zip(sizes, heights, strict=True)]
        return cls(
            schema.num_params,
            np.cumsum([0, *sizes], dtype=np.int64),
            np.array(heights, dtype=np.int64),
            np.array(strides, dtype=np.int64),
            np.array(features, dtype=np.int64),
            np.cumsum([0, *counts], dtype=np.int64),
        )

    @property
    def num_tensors(self) -> int:
        """Number of tensors (matrices)."""
        return len(self.heights)

    @cached_property
    def tensor_of_column(self) -> Int64:
        """Tensor number of each column."""
        return np.repeat(np.arange(self.num_tensors), np.diff(self.columns))

    @cached_property
    def height_of_column(self) -> Int64:
        """Height of each column."""
        return np.repeat(self.heights, np.diff(self.columns))

    @cached_property
    def groups(self) -> list[int]:
        """The distinct column heights, ascending."""
        return sorted({int(h) for h in self.heights})

    @cached_property
    def sides(self) -> tuple[Int64, Int64]:
        """Tensors by orientation: strided columns (LoRA's A), contiguous ones (B); their densities differ."""
        return np.flatnonzero(self.features > 1), np.flatnonzero(self.features == 1)

    def tensor_of(self, indices: Int64) -> Int64:
        """Tensor number of each coordinate."""
        tensor: Int64 = np.searchsorted(self.offsets, indices, side="right") - 1
        return tensor

    def columns_of(self, indices: Int64) -> tuple[Int64, Int64]:
        """(column, row within the column) of each coordinate."""
        tensor = self.tensor_of(indices)
        local = indices - self.offsets[tensor]
        feature, height = self.features[tensor], self.heights[tensor]
        # a tensor is blocks of height * feature coordinates; strided blocks are row-major, contiguous ones column-major
        block: Int64 = local // (feature * height)
        inner: Int64 = local % (feature * height)
        strided = feature > 1
        row: Int64 = np.where(strided, inner // feature, inner)
        column: Int64 = np.where(strided, inner % feature, 0)
        number: Int64 = self.columns[tensor] + block * feature + column
        return number, row

    def indices_of(self, columns: Int64, rows: Int64) -> Int64:
        """Inverse of `columns_of`."""
        tensor = self.tensor_of_column[columns]
        local = columns - self.columns[tensor]
        block, column = local // self.features[tensor], local % self.features[tensor]
        start = self.offsets[tensor] + block * self.features[tensor] * self.heights[tensor] + column
        indices: Int64 = start + rows * self.strides[tensor]
        return indices


def _divisor(rank: int) -> int:
    return next(h for h in range(min(rank, _MAX_HEIGHT), 0, -1) if rank % h == 0)


@dataclass(frozen=True)
class SupportPlan:
    """Model parameters chosen for one support: concentration index, density class per tensor; and the bits it takes."""

    concentration: int
    classes: Int64
    bits: float


def plan(layout: Layout, columns: Int64) -> SupportPlan:
    """Best model parameters for a support given by the column of each non-zero, and its estimated code length."""
    counts = np.bincount(columns, minlength=int(layout.columns[-1]))
    used = np.flatnonzero(counts)
    owner, filled = layout.tensor_of_column[used], counts[used]
    costs = np.zeros((layout.num_tensors, len(CONCENTRATIONS), len(DENSITIES)))
    for height in layout.groups:
        members = np.flatnonzero(layout.heights == height)
        # columns by (tensor, number of non-zeros); whole numbers below 2^53, so that the product is exact
        mine = layout.heights[owner] == height
        key = owner[mine] * (height + 1) + filled[mine]
        histogram = np.bincount(key, minlength=layout.num_tensors * (height + 1)).reshape(-1, height + 1)
        histogram[:, 0] = np.diff(layout.columns) - histogram.sum(axis=1)
        histogram = histogram[members]
        costs[members] = (histogram.astype(np.float64) @ _code_lengths(height)).reshape(len(members), *costs.shape[1:])
    classes = costs.argmin(axis=2).T
    totals = costs.min(axis=2).sum(axis=0)
    best = int(totals.argmin())
    # the adaptive class coder spends about 3 bits on a matrix that sends something, less than 1 on one that does not
    side = 4 + 5 + 0.7 * layout.num_tensors + 2.5 * np.count_nonzero(classes[best] < classes[best].max())
    return SupportPlan(best, classes[best].astype(np.int64), float(totals[best]) / _COST_UNIT + side)


def write(writer: Writer, layout: Layout, indices: Int64, chosen: SupportPlan) -> None:
    """Code a support (sorted unique coordinates) under the chosen plan."""
    column, row = layout.columns_of(indices)
    counts = np.bincount(column, minlength=int(layout.columns[-1]))
    writer.put([chosen.concentration], uniform(len(CONCENTRATIONS)))
    for members in layout.sides:
        writer.put_adaptive(chosen.classes[members].tolist(), Adaptive(len(DENSITIES)))
    for m in range(layout.num_tensors):
        model = _column_model(int(layout.heights[m]), int(chosen.classes[m]), chosen.concentration)
        writer.put(counts[layout.columns[m] : layout.columns[m + 1]], model)
    number = np.full(counts.size, -1, dtype=np.int64)
    for height in layout.groups:
        used = _used_columns(layout, counts, height)
        number[used] = np.arange(used.size)
        mine = number[column] >= 0
        mask = np.zeros((height, used.size), dtype=bool)
        mask[row[mine], number[column[mine]]] = True
        number[used] = -1
        left = counts[used].copy()
        for j in range(height - 1):
            for remaining in range(1, min(height - j - 1, int(left.max(initial=0))) + 1):
                among = np.flatnonzero(left == remaining)
                writer.put(mask[j, among], coin(remaining, height - j - remaining))
            left -= mask[j]


def read(reader: Reader, layout: Layout) -> Coordinates:
    """Decode a support. Never more than the schema holds, whatever the stream says."""
    concentration = int(reader.get(1, uniform(len(CONCENTRATIONS)))[0])
    classes = np.zeros(layout.num_tensors, dtype=np.int64)
    for members in layout.sides:
        classes[members] = reader.get_adaptive(members.size, Adaptive(len(DENSITIES)))
    counts = np.empty(int(layout.columns[-1]), dtype=np.uint8)
    for m in range(layout.num_tensors):
        model = _column_model(int(layout.heights[m]), int(classes[m]), concentration)
        reader.fill(counts[layout.columns[m] : layout.columns[m + 1]], model)
    mask = np.zeros(layout.num_params, dtype=np.bool_)
    for height in layout.groups:
        _read_rows(reader, layout, counts, height, mask)
    return Coordinates(mask, layout.offsets)


def _read_rows(
    reader: Reader, layout: Layout, counts: npt.NDArray[np.uint8], height: int, mask: npt.NDArray[np.bool_]
) -> None:
    """Set in the mask what the columns of one height hold."""
    left, place, stride = _used(layout, counts, height)
    for j in range(height):
        bits = left == height - j  # no choice left: every remaining row is set
        for remaining in range(1, min(height - j - 1, int(left.max(initial=0))) + 1):
            for start, end in runs(0, left.size):
                among = np.flatnonzero(left[start:end] == remaining)
                bits[start:end][among] = reader.get(among.size, coin(remaining, height - j - remaining))
        for start, end in runs(0, left.size):
            mask[place[start:end][bits[start:end]]] = True
        place += stride
        left -= bits


def _used(
    layout: Layout, counts: npt.NDArray[np.uint8], height: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.signedinteger], npt.NDArray[np.signedinteger]]:
    """Columns of one height that hold something: how much, first coordinate, and distance between rows."""
    members = np.flatnonzero(layout.heights == height).tolist()
    spans = [run for m in members for run in runs(int(layout.columns[m]), int(layout.columns[m + 1]))]
    size = sum(int(np.count_nonzero(counts[start:end])) for start, end in spans)
    small: type[np.signedinteger] = np.int32 if layout.num_params < 1 << 30 else np.int64
    left = np.empty(size, dtype=np.uint8)
    place: npt.NDArray[np.signedinteger] = np.empty(size, dtype=small)
    stride: npt.NDArray[np.signedinteger] = np.empty(size, dtype=small)
    first = 0
    for m in members:
        feature = int(layout.features[m])
        for start, end in runs(int(layout.columns[m]), int(layout.columns[m + 1])):
            used = np.flatnonzero(counts[start:end])
            column = used + (start - int(layout.columns[m]))
            mine = slice(first, first + used.size)
            left[mine] = counts[start:end][used]
            place[mine] = layout.offsets[m] + column // feature * feature * height + column % feature
            stride[mine] = layout.strides[m]
            first += used.size
    return left, place, stride


def _used_columns(layout: Layout, counts: Int64, height: int) -> Int64:
    used: Int64 = np.flatnonzero(counts)
    mine: Int64 = used[layout.heights[layout.tensor_of_column[used]] == height]
    return mine


def _weights(height: int, density: float, concentration: float) -> list[float]:
    """Beta-binomial P(count) * const for count 0 .. height, by its recurrence: only exactly rounded operations."""
    a, b = density * concentration, (1.0 - density) * concentration
    weights = [1.0]
    for c in range(height):
        weights.append(weights[-1] * (height - c) * (c + a) / ((c + 1) * (height - c - 1 + b)))
    return weights


@lru_cache(maxsize=4096)
def _column_model(height: int, density_class: int, concentration: int) -> Any:
    return table(_weights(height, DENSITIES[density_class], CONCENTRATIONS[concentration]))


@lru_cache(maxsize=32)
def _code_lengths(height: int) -> Float64:
    """Bits * 1024 of a column, its rows included: (count, concentration * density class), whole numbers."""
    lengths = np.empty((height + 1, len(CONCENTRATIONS), len(DENSITIES)))
    for s, concentration in enumerate(CONCENTRATIONS):
        for d, density in enumerate(DENSITIES):
            weights = _weights(height, density, concentration)
            total = math.fsum(weights)
            for c, w in enumerate(weights):
                bits = -math.log2(max(w / total, 2.0**-22)) + math.log2(math.comb(height, c))
                lengths[c, s, d] = round(bits * _COST_UNIT)
    return lengths.reshape(height + 1, -1)
