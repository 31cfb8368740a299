"""Rarity: keep tokens whose ids are rare, in the prompt itself or by counts from a corpus."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedfstq_hf.errors import ConfigError


class Rarity:
    """Score = -log frequency of the id (self-information under a unigram model, arXiv 2310.06201). For comparison.

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
