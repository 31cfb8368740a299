"""Weighted cross-entropy that keeps one gradient beside the logits, and no other tensor of their size."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_CHUNK = 2**18  # logits at a time: they and what is computed from them stay in a CPU core's cache


def weighted_cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """`sum_i weights_i * -log softmax(logits_i)[targets_i]`, a scalar in float32 (float64 for such logits).

    logits: (N, V) of any float dtype, N may be 0. targets: (N,) int64 in 0 .. V-1. weights: (N,). Beside the logits, a
    forward and backward pass of `F.cross_entropy` allocates three tensors of (N, V), this one.
    """
    return weighted_and_plain(logits, targets, weights)[0]


def weighted_and_plain(logits: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The same, and beside it the sum in which every position weighs 1, without gradient; of the same arguments."""
    loss, losses = _WeightedCrossEntropy.apply(logits, targets, weights)  # type: ignore[no-untyped-call]
    return loss, losses.sum()


class _WeightedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        losses = logits.new_empty(len(targets), dtype=dtype)
        picked = logits.gather(1, targets[:, None])[:, 0].to(dtype)
        for rows in _chunks(logits):
            losses[rows] = F.cross_entropy(logits[rows].to(dtype), targets[rows], reduction="none")
        weights = weights.to(dtype)
        ctx.save_for_backward(logits, targets, weights, losses + picked)
        ctx.mark_non_differentiable(losses)
        return (weights * losses).sum(), losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        logits, targets, weights, log_sums = ctx.saved_tensors
        factors = gradient * weights
        result = torch.empty_like(logits)
        for rows in _chunks(logits):
            chunk = torch.sub(logits[rows].to(factors.dtype), log_sums[rows, None]).exp_().mul_(factors[rows, None])
            chunk.scatter_add_(1, targets[rows, None], -factors[rows, None])
            result[rows] = chunk
        return result, None, None


def _chunks(logits: Tensor) -> list[slice]:
    """Rows to be worked on together: few on the CPU, for its cache; on an accelerator many, for its many cores."""
    size = _CHUNK if logits.device.type == "cpu" else 64 * _CHUNK
    rows = max(1, size // logits.shape[1])
    return [slice(start, start + rows) for start in range(0, len(logits), rows)]
