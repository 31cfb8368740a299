"""The format of codec `uniform`: groups, steps, classes of magnitudes, and their payload (codec.py has its table)."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...errors import MessageError
from ..codec import SparseUpdate
from ..coding.entropy import Adaptive, Reader, Writer, table, uniform
from ..schema import Schema, TensorSpec

CLASSES = 32
MAX_MAGNITUDE = 256
WEIGHTS = 48
OFFSETS = 32
FINE = 16
STEPS = 512
LOWEST = -80
_QUARTERS = np.array([1.0, 1.1892071, 1.4142135, 1.6817929], dtype=np.float32)  # 2^(i/4)
# 2^(i/64)
_FINE = [1.0, 1.0108893, 1.0218972, 1.0330249, 1.0442737, 1.0556452, 1.0671405, 1.0787607]
_FINE += [1.0905077, 1.1023825, 1.1143868, 1.1265216, 1.1387886, 1.1511892, 1.1637249, 1.1763978]

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]


class Shape(NamedTuple):
    """How values of one class are coded: weight indices (m + 1,) and offsets (3,)."""

    weights: Int64
    offsets: Int64

    def levels(self) -> npt.NDArray[np.float64]:
        """Where each magnitude is read, in steps, (m + 1,); 0 stays 0."""
        magnitudes = np.arange(len(self.weights), dtype=np.float64)
        shift = self.offsets[np.minimum(np.arange(len(self.weights)), 3) - 1] / OFFSETS - 0.5
        return np.where(magnitudes > 0, magnitudes + shift, 0.0)

    def model(self) -> Any:
        """Entropy model of signed magnitude + m."""
        weights = np.ldexp(np.where(self.weights % 2, 0.70710678, 1.0), -(self.weights // 2))
        return table([*(weights[:0:-1] / 2), weights[0], *(weights[1:] / 2)])


class Levels(NamedTuple):
    """A quantised adapter: per tensor the signed magnitudes (groups, width), classes and steps (groups,)."""

    magnitudes: list[npt.NDArray[np.signedinteger]]
    classes: list[Int64]
    steps: list[Int64]
    fine: int
    shapes: dict[int, Shape]


@lru_cache(maxsize=FINE)
def step_grid(fine: int) -> Float32:
    """All steps, ascending, float32 (512,), raised by `fine` 64ths of an octave."""
    quarters = _QUARTERS * np.float32(_FINE[fine])
    grid: Float32 = np.ldexp(quarters, np.arange(LOWEST, LOWEST + STEPS // 4)[:, None]).reshape(-1)
    return grid


def as_groups(spec: TensorSpec, vector: Tensor) -> npt.NDArray[np.float32]:
    """One tensor of a flat vector as (groups, width), groups <= width."""
    part = vector[spec.offset : spec.offset + spec.size].numpy()
    groups, width = shape_of(spec)
    return np.ascontiguousarray(part.reshape(width, groups).T) if is_tall(spec) else part.reshape(groups, width)


def write(levels: Levels) -> bytes:
    """The payload of quantised values."""
    if not levels.shapes:
        return b""
    writer = Writer()
    classes = np.concatenate(levels.classes)
    writer.put_adaptive(classes.tolist(), Adaptive(CLASSES))
    coded, flags = [], []
    before: Int64 | None = None
    for steps, numbers in zip(levels.steps, levels.classes, strict=True):
        ways = [_residuals(None, steps, numbers)]
        if before is not None and len(before) == len(steps):
            ways.append(_residuals(before, steps, numbers))
        flag = min(range(len(ways)), key=lambda w: sum(min(r, STEPS - r) for r in ways[w][0]))
        residuals, before = ways[flag]
        coded.append(residuals)
        flags.append(flag)
    writer.put_adaptive(flags, Adaptive(2))
    writer.put([levels.fine], uniform(FINE))
    step_model = Adaptive(STEPS)
    for residuals in coded:
        writer.put_adaptive(residuals, step_model)
    largest, weights = Adaptive(MAX_MAGNITUDE), Adaptive(WEIGHTS)
    models = {}
    for number in sorted(levels.shapes):
        shape = levels.shapes[number]
        writer.put_adaptive([len(shape.weights) - 2], largest)
        writer.put_adaptive(shape.weights.tolist(), weights)
        writer.put(shape.offsets, uniform(OFFSETS))
        models[number] = shape.model()
    for magnitudes, numbers in zip(levels.magnitudes, levels.classes, strict=True):
        for row, number in zip(magnitudes, numbers.tolist(), strict=True):
            if number:
                writer.put(row + (len(levels.shapes[number].weights) - 1), models[number])
    return writer.finish()


def read(payload: bytes, sides: list[tuple[int, int]]) -> Levels:
    """Inverse of `write`; sides: (groups, width) of every tensor. Raises MessageError on any malformed payload."""
    reader = Reader(payload)
    flat = np.array(reader.get_adaptive(sum(groups for groups, _ in sides), Adaptive(CLASSES)), dtype=np.int64)
    classes = np.split(flat, np.cumsum([groups for groups, _ in sides])[:-1])
    flags = reader.get_adaptive(len(sides), Adaptive(2))
    fine = int(reader.get(1, uniform(FINE))[0])
    step_model = Adaptive(STEPS)
    steps: list[Int64] = []
    for i, flag in enumerate(flags):
        if flag and (i == 0 or sides[i - 1][0] != sides[i][0]):
            raise MessageError("uniform payload predicts steps from a tensor that does not match; it is malformed")
        steps.append(np.zeros(sides[i][0], dtype=np.int64))
        last = 0
        for k, number in enumerate(classes[i].tolist()):
            last = int(steps[i - 1][k]) if flag else last
            if number:
                last = (last + reader.get_adaptive(1, step_model)[0]) % STEPS
            steps[i][k] = last
    largest, weights = Adaptive(MAX_MAGNITUDE), Adaptive(WEIGHTS)
    shapes, models = {}, {}
    for number in sorted(set(flat.tolist()) - {0}):
        top = reader.get_adaptive(1, largest)[0] + 1
        indices = np.array(reader.get_adaptive(top + 1, weights), dtype=np.int64)
        shapes[number] = Shape(indices, reader.get(3, uniform(OFFSETS)).astype(np.int64))
        models[number] = shapes[number].model()
    magnitudes: list[npt.NDArray[np.signedinteger]] = []
    for (groups, width), numbers in zip(sides, classes, strict=True):
        rows = np.zeros((groups, width), dtype=np.int16)
        for k, number in enumerate(numbers.tolist()):
            if number:
                reader.fill(rows[k], models[number])
                rows[k] -= len(shapes[number].weights) - 1
        magnitudes.append(rows)
    reader.finish()
    return Levels(magnitudes, classes, steps, fine, shapes)


def values_of(levels: Levels, i: int) -> Float32:
    """Tensor i as decoded, float32 (groups, width)."""
    out = np.zeros(levels.magnitudes[i].shape, dtype=np.float32)
    grid = step_grid(levels.fine)
    for k, number in enumerate(levels.classes[i].tolist()):
        if number:
            row = levels.magnitudes[i][k]
            points = (levels.shapes[number].levels() * np.float64(grid[levels.steps[i][k]])).astype(np.float32)
            out[k] = np.concatenate([-points[:0:-1], points])[row + (points.size - 1)]
    return out


def _residuals(before: Int64 | None, steps: Int64, classes: Int64) -> tuple[list[int], Int64]:
    """Steps less their prediction modulo 512, of groups not 0, and the steps that the reader will hold for all groups.

    before: held steps of the tensor before, or None to predict by the group before. A group of zeros holds its
    prediction.
    """
    residuals, held, last = [], np.zeros(len(steps), dtype=np.int64), 0
    for k, number in enumerate(classes.tolist()):
        last = last if before is None else int(before[k])
        if number:
            residuals.append((int(steps[k]) - last) % STEPS)
            last = int(steps[k])
        held[k] = last
    return residuals, held


def assemble(schema: Schema, levels: Levels) -> SparseUpdate:
    """The update that levels stand for."""
    flat = torch.zeros(schema.num_params, device="cpu")
    for i, spec in enumerate(schema.tensors):
        values = values_of(levels, i)
        values = values.T if is_tall(spec) else values
        flat[spec.offset : spec.offset + spec.size] = torch.from_numpy(values.reshape(-1))
    return SparseUpdate(schema.num_params, None, flat)


def shape_of(spec: TensorSpec) -> tuple[int, int]:
    """(groups, width) with groups <= width; a vector is one group."""
    rows = spec.shape[0] if spec.shape else 1
    width = spec.size // max(rows, 1)
    return (min(rows, width), max(rows, width)) if min(rows, width) >= 2 else (min(spec.size, 1), spec.size)


def is_tall(spec: TensorSpec) -> bool:
    """Whether groups are columns of the tensor as it is stored."""
    groups, width = shape_of(spec)
    return groups >= 2 and spec.shape[0] == width != groups
