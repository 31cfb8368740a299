"""Rate-distortion choice of coordinates: rank them by Fisher-weighted distortion saved per bit they cost.

Importance u = F * delta^2 alone ignores that a coordinate costs few bits where others are already sent, and that a
level does not reproduce it exactly. Both are known once a first support stands, so the two are refined in turn.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from . import support
from .allocation import largest_fitting, strongest
from .quantization import fit_levels
from .support import Int64, Layout

Float64 = npt.NDArray[np.float64]
_REFINEMENTS = 2
_POOL = 3  # candidates per coordinate of the first support
_FEW_BITS = 2.5  # a coordinate costs more, unless a large share of all is sent
_LEVEL_BITS = 0.95  # bits of a level number per binary digit: Lloyd-Max cells are not equally full
_MATRIX_BITS = 4.0  # bits of one level of one matrix
_TOLERANCE = 0.003  # of the count, while refining


@dataclass(frozen=True)
class Ranking:
    """Candidates in the order in which to send them, and how many are worth it.

    order: positions among the selector's candidates, most valuable first. count: how many to send, by estimate.
    saved: Fisher-weighted distortion that these save, by estimate.
    """

    order: Int64
    count: int
    saved: float


class Selector:
    """Ranks the coordinates of one update (num_params,) for either `limit` payload bits or a fixed `count`.

    root: square root of the weight of each coordinate's squared error.
    """

    def __init__(self, layout: Layout, vector: Tensor, root: Tensor, *, limit: float | None, count: int | None) -> None:
        self.layout = layout
        self._limit, self._count = limit, count
        score = (vector.abs() * root).numpy()
        self._take(
            strongest(score, count if count is not None else 1024 + int((limit or 0.0) / _FEW_BITS)), vector, root
        )
        self._first = self._fitting(self._by_importance, 1)
        if limit is not None and self._first == self.indices.size < layout.num_params:
            self._take(strongest(score, layout.num_params), vector, root)
        elif _POOL * self._first > self.indices.size:
            self._take(strongest(score, _POOL * self._first), vector, root)
        else:
            self._take(self.indices[self._by_importance[: _POOL * self._first]], vector, root)

    def _take(self, ranked: Int64, vector: Tensor, root: Tensor) -> None:
        """Make `ranked` the candidates; they are kept in coordinate order, so that ties go to the lower coordinate."""
        self.indices = np.sort(ranked)
        self.columns = self.layout.columns_of(self.indices)[0]
        self._by_importance = np.searchsorted(self.indices, ranked)
        self._tensors = self.layout.tensor_of(self.indices)
        self._magnitude = np.abs(vector.numpy()[self.indices]).astype(np.float64)
        self.weight = root.numpy()[self.indices].astype(np.float64) ** 2

    def rank(self, levels: int, start: Ranking | None = None) -> Ranking:
        """Best ranking for `levels` levels, starting from another number's ranking or from importance alone."""
        order = self._by_importance if start is None else start.order
        ranking = Ranking(order, self._fitting(order, levels, self._first if start is None else start.count), 0.0)
        for _ in range(_REFINEMENTS):
            if ranking.count:
                ranking = self._refine(ranking, levels)
        return ranking

    def saved(self, ranking: Ranking, levels: int) -> float:
        """Distortion that a ranking would save, by estimate, if it were sent with another number of levels."""
        count = self._fitting(ranking.order, levels, ranking.count)
        return float(self._gain(ranking.order[:count], levels)[ranking.order[:count]].sum()) if count else 0.0

    def estimate(self, order: Int64, levels: int) -> float:
        """Payload bits of some candidates, without coding them."""
        if not order.size:
            return 0.0
        values = order.size * (1 + _LEVEL_BITS * float(np.log2(levels)))
        matrices = _MATRIX_BITS * levels * min(order.size, self.layout.num_tensors)
        return 2 + support.plan(self.layout, self.columns[order]).bits + values + matrices

    def _fitting(self, order: Int64, levels: int, guess: int = 0) -> int:
        if self._limit is None:
            return min(self._count or 0, order.size)
        guess = min(order.size, guess)
        return largest_fitting(lambda k: self.estimate(order[:k], levels), order.size, self._limit, _TOLERANCE, guess)

    def _refine(self, ranking: Ranking, levels: int) -> Ranking:
        chosen = ranking.order[: ranking.count]
        gain = self._gain(chosen, levels)
        value = gain / (self._bits(chosen) + 1 + _LEVEL_BITS * float(np.log2(levels)))
        order = strongest(value, value.size)
        count = self._fitting(order, levels, ranking.count)
        return Ranking(order, count, float(gain[order[:count]].sum()))

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

    def _bits(self, chosen: Int64) -> Float64:
        """What each candidate adds to the coded support, given the others that are chosen. (candidates,)"""
        columns = self.columns[chosen]
        others = np.bincount(columns, minlength=int(self.layout.columns[-1]))[self.columns]
        others[chosen] -= 1
        return support.marginal_bits(self.layout, support.plan(self.layout, columns))[self._tensors, others]
