"""Rate-distortion choice of coordinates: rank them by weighted distortion saved per bit they cost.

Importance u = F * delta^2 alone ignores that a coordinate costs few bits where others are already sent, and that a
level does not reproduce it exactly. Both are known once a first support stands, so the two are refined in turn.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from . import support
from .allocation import strongest
from .quantization import fit_levels
from .support import Int64, Layout

Float64 = npt.NDArray[np.float64]
_REFINEMENTS = 2
_FIRST_BITS = 8.0  # of a coordinate, before anything is known
_LEVEL_BITS = 0.95  # bits of a level number per binary digit: Lloyd-Max cells are not equally full
_MATRIX_BITS = 4.0  # bits of one level of one matrix


@dataclass(frozen=True)
class Ranking:
    """Candidates in the order in which to send them.

    order: positions among the candidates, most valuable first. bits: of the first 1, 2, ... of them, by estimate.
    saved: weighted distortion that the first `count`, those that fit, save.
    """

    order: Int64
    bits: Float64
    count: int
    saved: float


@dataclass(frozen=True)
class Chosen:
    """Coordinates to send: indices ascending, values and weights likewise (nnz,), with `levels` levels."""

    indices: Int64
    values: Float64
    weight: Float64
    levels: int


class Selector:
    """Ranks candidates for `limit` payload bits.

    indices: ascending coordinates (candidates,). values: what they have left to send. weight: of the squared error.
    """

    def __init__(self, layout: Layout, indices: Int64, values: Float64, weight: Float64, limit: float) -> None:
        self.layout, self.indices, self.values, self.weight = layout, indices, values, weight
        self._limit = limit
        self._columns = layout.columns_of(indices)[0]
        self._tensors = layout.tensor_of(indices)
        self._magnitude = np.abs(values)
        self._importance = weight * self._magnitude**2

    def rank(self, levels: int, start: Ranking | None = None) -> Ranking:
        """Best ranking for `levels` levels, starting from another number's ranking or from importance alone."""
        if start is None:
            chosen = strongest(self._importance, max(1, int(self._limit / _FIRST_BITS)))
        else:
            chosen = start.order[: start.count]
        ranking = self._refine(chosen, levels)
        for _ in range(_REFINEMENTS - 1):
            if ranking.count:
                ranking = self._refine(ranking.order[: ranking.count], levels)
        return ranking

    def take(self, order: Int64, levels: int) -> Chosen:
        """Some candidates, by their positions."""
        order = np.sort(order)
        return Chosen(self.indices[order], self.values[order], self.weight[order], levels)

    def _refine(self, chosen: Int64, levels: int) -> Ranking:
        """Rank by gain per bit, both as they are while `chosen` is sent."""
        if not chosen.size:
            return Ranking(chosen, np.zeros(0), 0, 0.0)
        columns = self._columns[chosen]
        plan = support.plan(self.layout, columns)
        others = np.bincount(columns, minlength=int(self.layout.columns[-1]))[self._columns]
        others[chosen] -= 1
        bits = support.marginal_bits(self.layout, plan)[self._tensors, others]
        fixed = 2 + _MATRIX_BITS * levels * np.unique(self._tensors[chosen]).size
        scale = plan.bits / bits[chosen].sum()  # so that the sum is what the support as a whole takes
        bits = bits * scale + 1 + _LEVEL_BITS * np.log2(levels)
        gain = self._gain(chosen, levels)
        order = strongest(gain / bits, bits.size)
        total = fixed + np.cumsum(bits[order])
        count = int(np.searchsorted(total, self._limit, side="right"))
        return Ranking(order, total, count, float(gain[order[:count]].sum()))

    def _gain(self, chosen: Int64, levels: int) -> Float64:
        """Distortion saved by sending each candidate, with levels fitted to the chosen ones. (candidates,)"""
        magnitude, weight = self._magnitude[chosen], self.weight[chosen]
        fitted, _ = fit_levels(magnitude, weight, self._tensors[chosen], self.layout.num_tensors, levels)
        # a matrix that sends nothing yet would get the overall mean
        fitted = np.where(fitted > 0, fitted, (weight * magnitude).sum() / weight.sum())
        best = np.full(self.indices.size, -np.inf)
        for j in range(levels):
            level = fitted[self._tensors, j]
            best = np.maximum(best, level * (2 * self._magnitude - level))
        gain: Float64 = self.weight * best
        return gain
