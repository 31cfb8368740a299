"""What a decoded message is: a sparse (or dense) vector of changes in the adapter's coordinate order.

And error feedback: what a message did not carry is added to the client's next update.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError

_PART = 1 << 17  # coordinates at a time: temporaries stay in the cache


@dataclass(frozen=True)
class SparseUpdate:
    """`values` at `indices` of a vector of `num_params` coordinates, zero elsewhere.

    indices: int64 (nnz,), strictly increasing, or None if `values` is dense (num_params,). values: float32, CPU.
    """

    num_params: int
    indices: Tensor | None
    values: Tensor

    @property
    def nnz(self) -> int:
        """Number of stored coordinates (all of them if dense)."""
        return self.values.numel()

    def add_to(self, acc: Tensor, weight: float) -> None:
        """acc += weight * update, in place and in acc's own dtype; work is proportional to nnz. acc: (num_params,)."""
        if self.indices is not None:
            acc[self.indices.to(acc.device)] += self.values.to(device=acc.device, dtype=acc.dtype) * weight
            return
        for part, values in zip(torch.split(acc, _PART), torch.split(self.values, _PART), strict=True):
            part += values.to(device=acc.device, dtype=acc.dtype) * weight

    def to_dense(self) -> Tensor:
        """A new float32 vector of shape (num_params,)."""
        if self.indices is None:
            return self.values.clone()
        dense = torch.zeros(self.num_params, dtype=torch.float32, device="cpu")
        dense[self.indices] = self.values
        return dense

    def norm(self) -> float:
        """Euclidean norm, accumulated in float64: finite exactly if every value is.

        The same bits on any processor, for any number of threads.
        """
        return math.sqrt(sum(_sum(part.double().square()) for part in torch.split(self.values, _PART)))


def _sum(terms: Tensor) -> float:
    """The sum of float64 (n,), which is overwritten; halves are added to each other until one number is left.

    A reduction of torch's adds in an order that depends on threads and instruction set.
    """
    while len(terms) > 1:
        half = (len(terms) + 1) // 2
        terms[: len(terms) - half] += terms[half:]
        terms = terms[:half]
    return float(terms[0]) if len(terms) else 0.0


@dataclass(frozen=True)
class ErrorFeedback:
    """Residual `r' = (delta + decay * r) - sent`. decay 1 forgets nothing, 0 switches error feedback off."""

    decay: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.decay <= 1.0:
            raise ConfigError(f"error feedback decay is {self.decay!r}; expected a number from 0 (off) to 1 (keep all)")

    def corrected(self, delta: Tensor, residual: Tensor | None) -> Tensor:
        """What to encode: `delta + decay * residual`, a new vector (num_params,). residual None: first round."""
        if residual is None or self.decay == 0.0:
            return delta.clone()
        return delta + self.decay * residual

    def after(self, corrected: Tensor, sent: SparseUpdate) -> Tensor:
        """Residual once `sent` was accepted: `corrected - sent`, a new vector (num_params,).

        If the update was refused or lost, the residual stays what it was before: the next `delta` replaces this one.
        """
        residual = corrected.clone()
        sent.add_to(residual, -1.0)
        return residual
