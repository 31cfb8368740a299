"""What a decoded message is: a sparse (or dense) vector of changes in the adapter's coordinate order."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

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
