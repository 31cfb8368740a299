"""From scores to kept positions: how many, which ones, and one rectangle for rows that keep different counts."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedfstq_hf.errors import ConfigError, NonFiniteError


def budgets(attention_mask: Tensor, keep_ratio: float | None, keep_tokens: int | None) -> Tensor:
    """(B,) int64 tokens to keep per row: `ceil(keep_ratio x real tokens)`, or at most `keep_tokens`."""
    lengths = attention_mask.long().sum(-1)
    if keep_tokens is not None:
        return lengths.clamp_max(keep_tokens)
    ratio = 1.0 if keep_ratio is None else keep_ratio
    counts = [math.ceil(round(ratio * length, 6)) for length in lengths.tolist()]  # 0.1 x 30 is 3.0000000000000004
    return torch.tensor(counts, device=lengths.device)


def check_spans(protected: Tensor, always: Tensor, budget: Tensor) -> None:
    """Raise ConfigError if the caller's spans (B, T) do not fit into a row's budget beside what is always kept."""
    needed = (protected | always).sum(-1)
    for row, (need, have) in enumerate(zip(needed.tolist(), budget.tolist(), strict=True)):
        if bool(protected[row].any()) and need > have:
            raise ConfigError(
                f"protected spans and what is always kept need {need} tokens in row {row}, the budget is "
                f"{have}; protect less, or raise keep_ratio or keep_tokens"
            )


def select(scores: Tensor, attention_mask: Tensor, protected: Tensor, budget: Tensor) -> Tensor:
    """Kept positions (B, K) int64, ascending in each row; K is the largest row's count.

    scores: (B, T), higher = keep; +inf allowed. protected: (B, T) bool, kept before all others, even beyond the budget.
    budget: (B,). A row that keeps fewer than K is filled up with its padding, then with its next best tokens. Ties go
    to the earlier token. Raises NonFiniteError on NaN scores.
    """
    real = attention_mask.bool()
    if bool((scores.isnan() & real).any()):
        raise NonFiniteError(
            "token scores hold NaN; nothing was dropped. Check the model's weights and the saliency file"
        )
    protected = protected & real
    count = torch.maximum(budget, protected.sum(-1)).clamp_max(real.sum(-1))
    best = scores.float().masked_fill(~real, -torch.inf)
    tier = protected.long()
    order = _argsort_by(best, tier + real.long())  # protected, then real tokens by score, then padding
    rank = order.argsort(dim=-1)
    kept = rank < count[:, None]
    filled = _argsort_by(best, 2 * kept.long() + (~real).long())[:, : int(count.max())]
    return filled.sort(dim=-1).values


def _argsort_by(scores: Tensor, tier: Tensor) -> Tensor:
    """Positions by tier, then by score, both descending, ties to the earlier position."""
    by_score = scores.argsort(dim=-1, descending=True, stable=True)
    by_tier = tier.gather(1, by_score).argsort(dim=-1, descending=True, stable=True)
    return by_score.gather(1, by_tier)
