"""What a scorer has to beat: scores that look at no model. Random, the end of the prompt, rare tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedfstq_hf.errors import ConfigError


class Random:
    """Uniform scores that depend on the seed and the row's own tokens, so that a prompt always gets the same ones."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def scores(self, model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, T) float32 in [0, 1), higher = keep."""
        rows = []
        for ids, mask in zip(input_ids.cpu(), attention_mask.cpu().bool(), strict=True):
            key = hash((self.seed, *ids[mask].tolist())) & (2**63 - 1)
            drawn = torch.rand(int(mask.sum()), generator=torch.Generator().manual_seed(key))
            rows.append(torch.zeros(len(ids)).masked_scatter(mask, drawn))
        return torch.stack(rows).to(input_ids.device)


class Recency:
    """Score = position (StreamingLLM, arXiv 2309.17453, applied to the prompt). With the first tokens,
    which are always kept: sinks and a sliding window."""

    def scores(self, model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, T) float32, higher = keep."""
        return torch.arange(input_ids.shape[1], device=input_ids.device).float().expand(input_ids.shape)


class Rarity:
    """Score = -log frequency of the id (self-information under a unigram model, arXiv 2310.06201).

    counts: (vocab_size,) occurrences in some corpus; None counts within the prompt at hand.
    """

    def __init__(self, counts: Tensor | None = None) -> None:
        self.counts = counts

    def scores(self, model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, T) float32, higher = keep."""
        if self.counts is not None:
            counts = self.counts.to(input_ids.device)
            if int(input_ids.max()) >= len(counts):
                raise ConfigError(f"token id {int(input_ids.max())} is outside the counts of {len(counts)} ids")
            return -(counts.float() + 1.0)[input_ids].log()
        rows = []
        for ids, mask in zip(input_ids, attention_mask.bool(), strict=True):
            _, inverse, count = ids[mask].unique(return_inverse=True, return_counts=True)
            rows.append(torch.zeros(ids.shape, device=ids.device).masked_scatter(mask, -count[inverse].float().log()))
        return torch.stack(rows)
