"""The price of a bit: how much weighted squared error one must save, so that all that is worth it fills a budget.

Found by trial on a sample of features, since what many thousand features take is well known from some of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from .factors import fit
from .stacks import Source, Stack, each, stacks_of, thin_for

# coordinates: a twentieth of the update, so that its cost is in proportion; enough at least to know the price well
_SHARE, _LEAST, _MOST = 20, 1 << 17, 1 << 19
_TRIALS = 8
_CLOSE = 0.02
_USUAL_SLOPE = 0.6  # bits fall with this power of the price
_COORDINATE_SHARE = 0.8  # of what independent coordinates would cost: they cluster


@dataclass(frozen=True)
class _Part:
    stack: Stack
    stride: int  # every so many-th feature of each of its tensors
    matrices: float  # that each of its tensors stands for
    delta: Tensor
    weight: Tensor

    @property
    def copies(self) -> float:
        """Coordinates that each one stands for."""
        return self.stride * self.matrices


class Sample:
    """Some features of some matrices of a source, all of them where there are few."""

    def __init__(self, source: Source, threads: int = 1) -> None:
        self._threads = threads
        num_params = source.schema.num_params
        wanted = -(-num_params // min(max(num_params // _SHARE, _LEAST), _MOST))
        self._source = source
        self._num_params = num_params
        self._parts = []
        for stack in stacks_of(source.schema, wanted):
            stride = thin_for(stack.f, wanted)
            some = replace(stack, tensors=stack.tensors[:: max(1, wanted // stride)])
            matrices = len(stack.tensors) / len(some.tensors)
            self._parts.append(_Part(some, stride, matrices, source.delta(some, stride), source.weight(some, stride)))

    def price(self, limit: float, *, coordinates: bool) -> float:
        """Price at which components, and single coordinates if they are sent, take about `limit` bits."""
        energy = sum(p.copies * float((p.weight * p.delta.square()).sum()) for p in self._parts)
        if energy == 0.0 or limit <= 0:
            return math.inf
        log_price, slope = math.log(0.2 * energy / (limit + 0.05 * self._num_params)), _USUAL_SLOPE
        last: tuple[float, float] | None = None
        for _ in range(_TRIALS):
            excess = math.log(max(self._bits(math.exp(log_price), coordinates), 1.0) / limit)
            if abs(excess) < _CLOSE:
                break
            if last is not None and last[0] != log_price:
                slope = min(max((last[1] - excess) / (log_price - last[0]), 0.3), 2.0)
            last = log_price, excess
            log_price += min(max(excess / slope, -3.0), 3.0)
        return math.exp(log_price)

    def importance(self, share: float, base: Tensor | None) -> float:
        """The weight * value^2 that a `share` of the coordinates exceeds, once `base` (num_params,) is sent."""
        state = None if base is None else self._source.schema.unflatten(base)
        values, copies = [], []
        for part in self._parts:
            rest = part.delta
            if state is not None:
                rest = rest - self._source.read(state, part.stack, part.stride)
            values.append((part.weight * rest.square()).reshape(-1))
            copies.append(np.full(values[-1].numel(), part.copies))
        value, copy = torch.cat(values).numpy(), np.concatenate(copies)
        order = np.argsort(-value)
        place = int(np.searchsorted(np.cumsum(copy[order]), share * self._num_params))
        return 0.0 if place >= value.size else float(value[order[place]])

    def _bits(self, price: float, coordinates: bool) -> float:
        bits, count, size, extra = 0.0, 0.0, 0.0, 0.0

        def fitted(part: _Part) -> tuple[float, Tensor]:
            rest = part.delta.clone()
            layers = fit(part.stack, rest, part.weight, price, self._source.exponent, part.stride)
            taken = part.matrices * sum(float(layer.bits.sum()) for layer in layers)
            return taken, (part.weight * rest.square()).reshape(-1) / price

        rests = []
        for part, (taken, value) in zip(self._parts, each(fitted, self._parts, self._threads), strict=True):
            bits += taken
            rests.append((part.copies, value))
        if not coordinates:
            return bits
        density = 0.02
        for _ in range(4):
            cost = 1 + math.log2((1 - density) / density)
            count = sum(copies * int((value > cost).sum()) for copies, value in rests)
            size = sum(copies * value.numel() for copies, value in rests)
            density = min(max(count / size, 1 / size), 0.45)
        for copies, value in rests:
            extra += copies * 0.5 * float((value[value > cost] / cost).log2().sum())
        entropy = -density * math.log2(density) - (1 - density) * math.log2(1 - density)
        return bits + (_COORDINATE_SHARE * size * entropy + count if count else 0.0) + extra
