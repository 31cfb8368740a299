"""Codec `factored`: each matrix's update as a few outer products s t^T of a short vector and a long vector of signs.

LoRA gradients are nearly of rank one along the rank dimension, so one sign per feature and one number per rank row say
about a third of an update's energy at 1/r bit per coordinate. It pays with error feedback, which sends the rest later.

Payload: one ANS stream (entropy.py), read in this order; an empty update is an empty payload. r is the smaller, f the
larger side of a tensor (vectors: r = 1).

| symbols | model | meaning |
|---|---|---|
| tensors | adaptive, 16 | number of components |
| r per component | adaptive, 256 | magnitudes of s, on the grid of quantization.py with 2 steps per octave |
| r + f - 1 per component | 1 bit each | the tail: signs of s, then of t without its first, + (1 = negative) |

Components lie in tensor order, those of one tensor in the order in which they are added up, in float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import ConfigError
from .allocation import Draft, fill
from .dense import read_delta, read_fisher
from .entropy import Adaptive, Reader, Writer
from .quantization import OCTAVES, grid, nearest
from .registry import CodecContext, Encoded, register
from .schema import Schema, TensorSpec
from .update import SparseUpdate

_MAX_COMPONENTS = 15
_STEPS = 2
_SWEEPS = 5
_FLOOR = 1e-3  # weight of a coordinate at least, as a share of its matrix's mean
_DEEPEST = 10  # grid steps below the matrix's largest |s|: smaller ones are raised to that
_ROW_BITS = 3.6  # sign and magnitude of one entry of s, by estimate


@dataclass(frozen=True)
class Component:
    """One outer product of one tensor: grid points (r,) and signs (r,) of s, signs (f,) of t; True is negative."""

    tensor: int
    points: npt.NDArray[np.int64]
    s_negative: npt.NDArray[np.bool_]
    t_negative: npt.NDArray[np.bool_]
    priority: float


@register("factored")
class FactoredCodec:
    """Sign factors, weighted by the root of the Fisher, as many as the budget carries.

    components: most per matrix (1 .. 15). Without `max_bytes` every matrix gets one.
    """

    name = "factored"

    def __init__(self, components: int = _MAX_COMPONENTS) -> None:
        if type(components) is not int or not 1 <= components <= _MAX_COMPONENTS:
            raise ConfigError(f"factored components is {components!r}; expected an integer from 1 to {_MAX_COMPONENTS}")
        self.components = components

    def encode(
        self,
        delta: Mapping[str, Tensor],
        fisher: Mapping[str, Tensor] | None = None,
        *,
        max_bytes: int | None = None,
        context: CodecContext | None = None,
    ) -> Encoded:
        """Code the components that matter most. Raises BudgetError if `max_bytes` is negative."""
        schema, vector = read_delta(delta)
        weights = read_fisher(schema, fisher)
        once = sum(_bits(spec) for spec in schema.tensors if spec.size)
        wanted = 1 if max_bytes is None else min(self.components, 2 + int(8 * max_bytes / max(once, 1)))
        components = _analyse(schema, vector, torch.ones_like(vector) if weights is None else weights, wanted)
        bits = np.cumsum([0.0, *(_bits(schema.tensors[c.tensor]) for c in components)])

        def draft(count: int) -> Draft:
            chosen = sorted(components[:count], key=lambda c: c.tensor)  # stable: the order within a tensor stays
            return Draft(_write(schema, chosen), _assemble(schema, [c.tensor for c in chosen], chosen))

        if max_bytes is None:
            best = draft(len(components))
        else:
            best = fill(draft, lambda k: float(bits[k]) + 8.0 * (k > 0), len(components), max_bytes)
        return Encoded(best.payload, best.update)

    def decode(self, payload: bytes, schema: Schema, context: CodecContext | None = None) -> SparseUpdate:
        """Sum of the components; tensors without any are left out. Raises MessageError on any malformed payload."""
        if not payload:
            return _assemble(schema, [], [])
        reader = Reader(payload)
        counts = reader.get_adaptive(len(schema.tensors), Adaptive(_MAX_COMPONENTS + 1))
        owners = [i for i, count in enumerate(counts) for _ in range(count)]
        shapes = [_sides(schema.tensors[i]) for i in owners]
        model = Adaptive(OCTAVES * _STEPS)
        points = [np.array(reader.get_adaptive(r, model), dtype=np.int64) for r, _ in shapes]
        signs = reader.finish(tail=sum(r + max(f - 1, 0) for r, f in shapes))

        def components() -> Iterator[Component]:
            for owner, (_, f), row in zip(owners, shapes, points, strict=True):
                s_negative, t_negative = signs.take(row.size), np.zeros(f, dtype=bool)
                t_negative[1:] = signs.take(max(f - 1, 0))
                yield Component(owner, row, s_negative, t_negative, 0.0)

        return _assemble(schema, owners, components())


def _sides(spec: TensorSpec) -> tuple[int, int]:
    """(r, f) with r <= f."""
    rows = spec.shape[0] if spec.shape else 1
    width = spec.size // max(rows, 1)
    return (min(rows, width), max(rows, width)) if min(rows, width) >= 2 else (1, spec.size)


def _tall(spec: TensorSpec) -> bool:
    return spec.size > 0 and min(_sides(spec)) >= 2 and spec.shape[0] == _sides(spec)[1] != _sides(spec)[0]


def _bits(spec: TensorSpec) -> float:
    r, f = _sides(spec)
    return f - 1 + _ROW_BITS * r


def _matrices(vector: Tensor, specs: list[TensorSpec]) -> Tensor:
    """(len(specs), r, f) copy of tensors that share sides and orientation."""
    r, f = _sides(specs[0])
    stack = torch.stack([vector[s.offset : s.offset + s.size] for s in specs])
    return stack.view(-1, f, r).transpose(1, 2).contiguous() if _tall(specs[0]) else stack.view(-1, r, f)


def _analyse(schema: Schema, vector: Tensor, fisher: Tensor, wanted: int) -> list[Component]:
    """Up to `wanted` components of every tensor, most valuable per bit first."""
    groups: dict[tuple[int, int, bool], list[int]] = {}
    for i, spec in enumerate(schema.tensors):
        if spec.size:
            groups.setdefault((*_sides(spec), _tall(spec)), []).append(i)
    components = []
    for members in groups.values():
        specs = [schema.tensors[i] for i in members]
        rest = _matrices(vector, specs)  # (m, r, f) what the components so far have left
        # a coordinate counts by the size of its gradient: that is what a step along it gains to first order
        weight = _matrices(fisher, specs).sqrt()
        weight = weight + _FLOOR * weight.mean(dim=(1, 2), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        ceiling = torch.full((len(members),), torch.inf, device="cpu")
        for _ in range(wanted):
            points, s, t = _component(rest, weight)
            left = rest - s[:, :, None] * t[:, None, :]
            gain = (weight * (rest.square() - left.square())).sum(dim=(1, 2)) / _bits(specs[0])
            # a component cannot go out before those that it corrects
            ceiling = torch.minimum(ceiling, gain)
            rest = left
            for j, member in enumerate(members):
                if ceiling[j] > 0:
                    args = points[j].numpy(), (s[j] < 0).numpy(), (t[j] < 0).numpy(), float(ceiling[j])
                    components.append(Component(member, *args))
    return sorted(components, key=lambda c: -c.priority)


def _component(rest: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted best s t^T with t of signs, by alternation: grid points (m, r), s (m, r) on the grid, t (m, f)."""
    scaled = (rest * weight.sqrt()).double()
    gram = (scaled @ scaled.transpose(1, 2)).nan_to_num()
    s = torch.linalg.eigh(gram).eigenvectors[:, :, -1].float()
    product, total = weight * rest, weight.sum(dim=2)
    for _ in range(_SWEEPS):
        t = _signs(product, s)
        s = (product * t[:, None, :]).sum(dim=2) / total
    points = torch.from_numpy(nearest(s.abs().double().numpy(), _STEPS))
    points = torch.maximum(points, points.max(dim=1, keepdim=True).values - _DEEPEST)
    s = torch.from_numpy(grid(_STEPS))[points] * torch.where(s < 0, -1.0, 1.0)
    t = _signs(product, s)
    first = t[:, :1].clone()
    return points, s * first, t * first


def _signs(product: Tensor, s: Tensor) -> Tensor:
    """Best signs t for given s: those of the weighted projection of each column. (m, f)"""
    return torch.where((product * s[:, :, None]).sum(dim=1) < 0, -1.0, 1.0)


def _write(schema: Schema, components: list[Component]) -> bytes:
    if not components:
        return b""
    writer = Writer()
    owners = np.array([c.tensor for c in components])
    writer.put_adaptive(np.bincount(owners, minlength=len(schema.tensors)).tolist(), Adaptive(_MAX_COMPONENTS + 1))
    model = Adaptive(OCTAVES * _STEPS)
    for component in components:
        writer.put_adaptive(component.points.tolist(), model)
    return writer.finish(tail=np.concatenate([a for c in components for a in (c.s_negative, c.t_negative[1:])]))


def _assemble(schema: Schema, owners: list[int], components: Iterable[Component]) -> SparseUpdate:
    """Sum of components, which belong to the tensors `owners`; tensors without any are left out if that is smaller."""
    magnitudes = grid(_STEPS)
    specs = [schema.tensors[i] for i in sorted(set(owners))]
    size = sum(spec.size for spec in specs)
    if 3 * size > schema.num_params:
        indices, size = None, schema.num_params
        starts = {i: spec.offset for i, spec in enumerate(schema.tensors)}
    else:
        ranges = [torch.arange(spec.offset, spec.offset + spec.size, device="cpu") for spec in specs]
        indices = torch.cat([torch.zeros(0, dtype=torch.int64, device="cpu"), *ranges])
        starts = dict(zip(sorted(set(owners)), np.cumsum([0, *(spec.size for spec in specs)]).tolist(), strict=False))
    values = torch.zeros(size, device="cpu")
    for c in components:
        spec = schema.tensors[c.tensor]
        s = torch.from_numpy(np.where(c.s_negative, -magnitudes[c.points], magnitudes[c.points]))
        t = torch.from_numpy(np.where(c.t_negative, np.float32(-1), np.float32(1)))
        view = values[starts[c.tensor] : starts[c.tensor] + spec.size]
        if _tall(spec):
            view.view(t.numel(), s.numel()).addcmul_(t[:, None], s[None])
        else:
            view.view(s.numel(), t.numel()).addcmul_(s[:, None], t[None])
    return SparseUpdate(schema.num_params, indices, values)
