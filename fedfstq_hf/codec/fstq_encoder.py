"""The search of codec `fstq`: a price per bit, components worth it, then coordinates until the budget is full."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from . import components, fstq_stream
from .allocation import Draft
from .components import Component
from .coordinates import LEVELS
from .factors import fit
from .fstq_stream import Written
from .selection import Ranking, Selector
from .stacks import Source, Stack, each, stacks_of
from .support import Layout
from .tradeoff import Sample

Parts = Literal["auto", "factors", "coordinates"]
Levels = Literal["auto", 1, 2, 4, 8]
_ROOM = 0.97  # share of the budget that components may take, by estimate
_POOL = 0.4  # candidates per bit that is left for coordinates
_SPARSE = 0.02  # share of coordinates below which one level per matrix is enough
_FULL = 0.99  # a payload that fills this share of the budget is not improved further
_AIM = 0.996
_TRIES = 8


class Encoder:
    """One update on its way into `max_bytes` bytes; parts and levels as `FstqCodec` has them.

    threads: how many stacks are worked on at a time; what comes out does not depend on it.
    """

    def __init__(self, source: Source, max_bytes: int, parts: Parts, levels: Levels, threads: int = 1) -> None:
        self._source, self._max_bytes, self._parts, self._levels = source, max_bytes, parts, levels
        self._threads = threads
        self._schema, self._layout = source.schema, Layout.of(source.schema)
        self._stacks = stacks_of(source.schema)

    def run(self) -> Draft:
        """The fullest payload that fits."""
        sample = Sample(self._source, self._threads)
        found: list[Component] = []
        if self._parts != "coordinates":
            price = sample.price(8.0 * self._max_bytes, coordinates=self._parts == "auto")
            found = self._components(price)
        while True:
            # the order of those within a tensor stays: sorting is stable
            ordered = sorted(found, key=lambda c: c.tensor)
            base = components.assemble(self._schema, ordered) if found else None
            best = self._filled(ordered, base, sample)
            if best is not None:
                return Draft(best.payload, fstq_stream.update(self._schema, base, best.indices, best.values))
            found = found[: len(found) * 15 // 16]

    def _components(self, price: float) -> list[Component]:
        """Components that are worth the price, most valuable first, as far as the budget can carry them."""
        if not math.isfinite(price):
            return []
        parts = each(lambda stack: self._fitted(stack, price), self._stacks, self._threads)
        found = [component for part in parts for component in part]
        found.sort(key=lambda c: -c.priority)
        room = np.searchsorted(np.cumsum([c.bits for c in found]), _ROOM * 8 * self._max_bytes, side="right")
        return found[: int(room)]

    def _fitted(self, stack: Stack, price: float) -> list[Component]:
        """Components of one stack."""
        found: list[Component] = []
        ceiling: dict[int, float] = {}
        for layer in fit(stack, self._source.delta(stack), self._source.weight(stack), price, self._source.exponent):
            negative, t = (layer.s < 0).numpy(), layer.t.to(torch.int8).numpy()
            value = (layer.gain / layer.bits).tolist()
            for row, member in enumerate(layer.members.tolist()):
                # a component cannot go out before those that it corrects
                ceiling[member] = min(ceiling.get(member, math.inf), value[row])
                points, bits = layer.points[row].numpy(), float(layer.bits[row])
                found.append(Component(stack.tensors[member], points, negative[row], t[row], ceiling[member], bits))
        return found

    def _filled(self, found: Sequence[Component], base: Tensor | None, sample: Sample) -> Written | None:
        """The components and as many coordinates as fit with them.

        None if the components do not fit, against the estimate, or leave room that is too small for any coordinate.
        """
        bare = best = fstq_stream.write(self._schema, self._layout, found, None)
        if len(bare.payload) > self._max_bytes:
            return None
        if self._parts == "factors":
            return best
        fixed = 8.0 * len(bare.payload)
        left = 8.0 * self._max_bytes - fixed
        share = _POOL * left / max(self._schema.num_params, 1)
        wanting = False
        while left > 0:
            selector = self._candidates(base, sample.importance(share, base) if share < 1 else 0.0, left)
            wanting = selector.indices.size > 0
            if wanting:
                best = self._fullest(found, selector, best, fixed)
            if share >= 1 or len(best.payload) >= _ROOM * self._max_bytes:
                break
            share *= 4
        return None if found and wanting and best is bare and len(best.payload) < _ROOM * self._max_bytes else best

    def _candidates(self, base: Tensor | None, threshold: float, limit: float) -> Selector:
        """Coordinates whose weight * value^2 exceeds the threshold once `base` is sent."""
        state = None if base is None else self._schema.unflatten(base)

        def beyond(stack: Stack) -> tuple[Tensor, Tensor, Tensor]:
            rest, weight = self._source.delta(stack), _natural(stack, self._source.weight(stack))
            if state is not None:
                rest -= self._source.read(state, stack)
            natural = _natural(stack, rest)
            row, place = (natural.square().mul_(weight) > threshold).nonzero(as_tuple=True)
            offset = torch.tensor([self._schema.tensors[i].offset for i in stack.tensors], device="cpu")
            return offset[row] + place, natural[row, place], weight[row, place]

        parts = each(beyond, self._stacks, self._threads)
        if not parts:
            return Selector(self._layout, np.zeros(0, dtype=np.int64), np.zeros(0), np.zeros(0), limit)
        places, values, weights = zip(*parts, strict=True)
        indices, order = torch.cat(places).sort()
        value = np.ldexp(torch.cat(values)[order].double().numpy(), self._source.exponent)
        return Selector(self._layout, indices.numpy(), value, torch.cat(weights)[order].double().numpy(), limit)

    def _fullest(self, found: Sequence[Component], selector: Selector, best: Written, fixed: float) -> Written:
        """Add candidates to components of `fixed` bits; `best` if not even one more fits."""
        levels, ranking = self._ranked(selector)
        bits, low, high = fixed + ranking.bits, 0, ranking.order.size + 1
        goal, ratio = _AIM * 8.0 * self._max_bytes, 1.0
        for _ in range(_TRIES):
            count = min(max(int(np.searchsorted(bits * ratio, goal, side="right")), low + 1), high - 1)
            if count <= low:
                break
            chosen = selector.take(ranking.order[:count], levels)
            current = fstq_stream.write(self._schema, self._layout, found, chosen)
            if len(current.payload) <= self._max_bytes:
                best, low = current, count
                if len(best.payload) >= _FULL * self._max_bytes:
                    break
            else:
                high = count
            ratio = 8.0 * len(current.payload) / bits[count - 1]
        return best

    def _ranked(self, selector: Selector) -> tuple[int, Ranking]:
        """Number of levels and ranking that save the most."""
        if self._levels != "auto":
            return self._levels, selector.rank(self._levels)
        levels, ranking = 1, selector.rank(1)
        for more in LEVELS[1:]:
            if ranking.count < _SPARSE * self._schema.num_params:
                break
            candidate = selector.rank(more, ranking)
            if candidate.saved > ranking.saved:
                levels, ranking = more, candidate
        return levels, ranking


def _natural(stack: Stack, tensor: Tensor) -> Tensor:
    """(m, r, f) as the tensors lie in memory: (m, size)."""
    return (tensor.transpose(1, 2) if stack.tall else tensor).reshape(tensor.shape[0], -1)
