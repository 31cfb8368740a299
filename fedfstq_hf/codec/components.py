"""What sign factors are in a message: components s t^T, their coding, and the dense vector that they add up to.

| symbols | model | meaning |
|---|---|---|
| tensors | adaptive, 16 | number of components, at most the tensor's smaller side |
| components | adaptive, 256 | largest magnitude of s, on the grid of quantization.py with 2 steps per octave |
| components | adaptive, 64 | density class c: a feature is in t with probability (2 c + 1) / 128 |
| 11 | uniform, 16 | frequency weight of each distance below the largest magnitude |
| r per component | categorical | distance below the largest magnitude, in grid steps |
| f per component | the class's coin | which features are in t |
| r per component, then all features in t | 1 bit each | signs of s and t (1 = negative), in the stream's tail |

Components lie in tensor order, those of one tensor in the order in which they are added up, in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import MessageError
from .entropy import Adaptive, Bits, Reader, Writer, coin, table, uniform
from .quantization import OCTAVES, grid
from .schema import Schema
from .stacks import is_tall, sides

Bools = npt.NDArray[np.bool_]
STEPS = 2  # grid steps per octave
DEEPEST = 10  # grid steps below the largest |s|: smaller ones are raised to that
_MOST = 15
_CLASSES = 64
_WEIGHTS = 16


@dataclass(frozen=True)
class Component:
    """One outer product of one tensor. points, s_negative: (r,). t: int8 (f,) of -1, 0, 1.

    priority: weighted squared error saved per bit. bits: by estimate.
    """

    tensor: int
    points: npt.NDArray[np.int64]
    s_negative: Bools
    t: npt.NDArray[np.int8]
    priority: float = 0.0
    bits: float = 0.0


def most_components(r: int) -> int:
    """Components of a tensor with smaller side r at most."""
    return min(r, _MOST)


def write(writer: Writer, schema: Schema, components: Sequence[Component]) -> Bools:
    """Put components, in tensor order, into a stream. Returns the bits that belong to its tail."""
    owners = np.array([c.tensor for c in components])
    writer.put_adaptive(np.bincount(owners, minlength=len(schema.tensors)).tolist(), Adaptive(_MOST + 1))
    tops = [int(c.points.max()) for c in components]
    writer.put_adaptive(tops, Adaptive(OCTAVES * STEPS))
    classes = [_class_of(c.t) for c in components]
    writer.put_adaptive(classes, Adaptive(_CLASSES))
    depth = np.concatenate([top - c.points for top, c in zip(tops, components, strict=True)])
    share = np.bincount(depth, minlength=DEEPEST + 1)
    weights = np.ceil(share * (_WEIGHTS - 1) / share.max())
    writer.put(weights, uniform(_WEIGHTS))
    writer.put(depth, table(weights.tolist()))
    for component, density in zip(components, classes, strict=True):
        writer.put(component.t != 0, _coin(density))
    return np.concatenate([c.s_negative for c in components] + [c.t[c.t != 0] < 0 for c in components])


def read(reader: Reader, schema: Schema) -> list[Component]:
    """Components as `write` put them, signs still missing (see `signed`). Raises MessageError if malformed."""
    shapes = [sides(spec) for spec in schema.tensors]
    counts = reader.get_adaptive(len(shapes), Adaptive(_MOST + 1))
    for count, (r, _), spec in zip(counts, shapes, schema.tensors, strict=True):
        if count > (most_components(r) if spec.size else 0):
            raise MessageError(
                f"payload gives a tensor of shape {spec.shape} {count} components; expected at most "
                f"{most_components(r) if spec.size else 0}"
            )
    owners = [i for i, count in enumerate(counts) for _ in range(count)]
    if not owners:
        raise MessageError("payload says that it has components, and then gives no tensor any")
    tops = reader.get_adaptive(len(owners), Adaptive(OCTAVES * STEPS))
    classes = reader.get_adaptive(len(owners), Adaptive(_CLASSES))
    weights = reader.get(DEEPEST + 1, uniform(_WEIGHTS))
    if not weights.any():
        raise MessageError("payload gives every magnitude of its components the frequency 0; expected one above 0")
    rows = [shapes[i][0] for i in owners]
    depth = np.split(reader.get(sum(rows), table(weights.tolist())), np.cumsum(rows)[:-1])
    components = []
    for owner, top, density, steps in zip(owners, tops, classes, depth, strict=True):
        t = np.empty(shapes[owner][1], dtype=np.int8)
        reader.fill(t, _coin(density))
        points = np.maximum(top - steps.astype(np.int64), 0)
        components.append(Component(owner, points, np.zeros(steps.size, dtype=np.bool_), t))
    return components


def num_signs(components: Sequence[Component]) -> int:
    """Bits of the tail that belong to these components."""
    return sum(c.points.size + int(np.count_nonzero(c.t)) for c in components)


def signed(components: Sequence[Component], bits: Bits) -> list[Component]:
    """The components with their signs, from the bits of the tail; t is written in place."""
    done = [Component(c.tensor, c.points, bits.take(c.points.size), c.t) for c in components]
    for c in done:
        used = c.t != 0
        c.t[used] = np.where(bits.take(int(np.count_nonzero(used))), np.int8(-1), np.int8(1))
    return done


def assemble(schema: Schema, components: Sequence[Component]) -> Tensor:
    """Their sum as a vector: (num_params,) float32. The same bits wherever it is computed: products are exact."""
    out = torch.zeros(schema.num_params, device="cpu")
    magnitudes = grid(STEPS)
    for c in components:
        spec = schema.tensors[c.tensor]
        r, f = sides(spec)
        s = torch.from_numpy(np.where(c.s_negative, -magnitudes[c.points], magnitudes[c.points]))
        t = torch.from_numpy(c.t.astype(np.float32))
        view = out[spec.offset : spec.offset + spec.size]
        if is_tall(spec):
            view.view(f, r).addcmul_(t[:, None], s[None])
        else:
            view.view(r, f).addcmul_(s[:, None], t[None])
    return out


def _class_of(t: npt.NDArray[np.int8]) -> int:
    return min(int(np.count_nonzero(t)) * _CLASSES // t.size, _CLASSES - 1)


def _coin(density: int) -> object:
    return coin(2 * density + 1, 2 * _CLASSES - 2 * density - 1)
