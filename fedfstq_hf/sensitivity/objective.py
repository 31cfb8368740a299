"""Token-filtered objectives: what each target token of a batch weighs in the local loss, and that loss (stage 2).

The loss of a batch with N target tokens is `sum(w_i * loss_i) / N`. The paper knows the hard mask alone; it keeps a
model from ever learning the ids it drops, which the other two avoid.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import ConfigError
from ..methods import OBJECTIVES
from ..ranges import Number, OneOf

GAMMA = 0.5
"""Exponent on the sensitivity. S is a squared gradient norm, and drawing tokens in proportion to the norm itself gives
the estimate of the gradient its least variance (importance sampling)."""
FLOOR = 0.25
"""Of `token_keep_ratio`: no token is kept with less probability than that, so no weight exceeds 4 / ratio."""
_LEAST = 1e-6  # scores are told apart down to that share of the largest


def token_weights(
    objective: str,
    scores: Tensor,
    valid: Tensor,
    *,
    ratio: float = 0.5,
    generator: torch.Generator | None = None,
    gamma: float = GAMMA,
) -> Tensor:
    """Weights of the target tokens of a batch, one example per row.

    Args:
        objective: `"full"`, `"hard"`, `"soft"` or `"unbiased"`.
        scores: (B, T) sensitivity of each target token's id, at least 0; +inf (never seen) counts as most sensitive.
        valid: (B, T) bool, true where there is a target token.
        ratio: share of the target tokens that `hard` and `unbiased` keep.
        generator: for `unbiased`, which draws one number per example, in order; CPU.
        gamma: exponent on the scores, for `soft` and `unbiased`.

    Returns:
        (B, T) float64, 0 where nothing is learned. N valid tokens weigh N in total under `full`, `soft` and `hard`
        (which makes `hard` the mean over the kept ones), and N in expectation under `unbiased`.
    """
    OneOf(OBJECTIVES).check("objective", objective)
    Number(0, 1, above=True, hint="0.5 keeps half").check("token_keep_ratio", ratio)
    weights = torch.zeros(valid.shape, dtype=torch.float64)
    count = int(valid.sum())
    if count == 0:
        return weights
    given = scores[valid].double()
    if objective == "full":
        weights[valid] = 1.0
    elif objective == "hard":
        kept = math.ceil(ratio * count - 1e-9)
        among = torch.zeros(count, dtype=torch.float64)
        among[torch.argsort(given, descending=True, stable=True)[:kept]] = count / kept
        weights[valid] = among
    elif objective == "soft":
        shares = _relative(given) ** gamma
        weights[valid] = shares / shares.mean()
    else:
        if generator is None:
            raise ConfigError("the unbiased objective draws tokens; pass generator=torch.Generator().manual_seed(...)")
        chance = torch.zeros(valid.shape, dtype=torch.float64)
        chance[valid] = keep_probabilities(given, ratio, gamma)
        kept_ones = _systematic(chance, torch.rand(len(chance), dtype=torch.float64, generator=generator))
        weights[kept_ones] = 1.0 / chance[kept_ones]
    return weights


def keep_probabilities(scores: Tensor, ratio: float, gamma: float = GAMMA) -> Tensor:
    """Probabilities that sum to `ratio * N`, as nearly proportional to `scores ** gamma` as floor and 1 allow.

    scores: (N,) at least 0, +inf counts as the largest. Returns (N,) float64 in [FLOOR * ratio, 1].
    """
    wanted, floor = ratio * len(scores), FLOOR * ratio
    shares = (_relative(scores.double()) ** gamma).clamp_min(_LEAST)
    low, high = 0.0, 1.0 / _LEAST
    for _ in range(80):  # the sum grows with the factor: halve the interval until float64 ends it
        factor = 0.5 * (low + high)
        if float((factor * shares).clamp(floor, 1.0).sum()) < wanted:
            low = factor
        else:
            high = factor
    return (high * shares).clamp(floor, 1.0)


def _relative(scores: Tensor) -> Tensor:
    """Scores as shares of the largest finite one, which those never seen are given; all 1 where all are 0."""
    seen = torch.isfinite(scores)
    largest = float(scores[seen].max()) if bool(seen.any()) else 0.0
    if largest == 0.0:
        return torch.ones_like(scores)
    return torch.where(seen, scores / largest, 1.0)


def _systematic(chance: Tensor, uniform: Tensor) -> Tensor:
    """Keep each token with its probability, and of each example a number within 1 of the expected one.

    The row's probabilities laid end to end, a token is kept if a mark falls into its piece; marks stand 1 apart from
    `uniform` on. chance: (B, T), uniform: (B,) in [0, 1). Returns (B, T) bool.
    """
    ends = chance.cumsum(dim=1)
    starts = torch.cat([torch.zeros(len(ends), 1, dtype=ends.dtype), ends[:, :-1]], dim=1)
    marks = uniform[:, None]
    return torch.floor(ends - marks) > torch.floor(starts - marks)


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
