"""Several scorers as one: a weighted mean of their ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedfstq_hf.errors import ConfigError
from fedfstq_hf.generation.blocks import early_scores
from fedfstq_hf.generation.scorer import BlockInput, EarlyScorer, Scorer


class Combined:
    """Score = sum of weight x rank, ranks within the row from 0 (lowest) to 1: scales of scorers never meet.

    scorers: any number, those that read hidden states all at the same layer. weights: positive, one for each.
    """

    def __init__(self, scorers: Sequence[Scorer], weights: Sequence[float]) -> None:
        if not scorers or len(scorers) != len(weights) or min(weights) <= 0:
            raise ConfigError(
                f"got {len(scorers)} scorers with weights {list(weights)}; expected one positive weight for each, for "
                "example Combined([QueryAttention(), TokenTable(table)], [0.75, 0.25])"
            )
        layers = sorted({scorer.layer for scorer in scorers if isinstance(scorer, EarlyScorer)})
        if len(layers) > 1:
            raise ConfigError(f"scorers read hidden states at layers {layers}; give them all the same layer")
        self.parts = tuple(zip(scorers, weights, strict=True))
        self._layer = layers[0] if layers else 0

    @property
    def layer(self) -> int:
        """How many blocks see the whole prompt."""
        return self._layer

    def scores(self, model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, T) float32, higher = keep."""
        if any(isinstance(scorer, EarlyScorer) for scorer, _ in self.parts):
            return early_scores(self, model, input_ids, attention_mask)
        ranked = (
            weight * ranks(scorer.scores(model, input_ids, attention_mask), attention_mask)
            for scorer, weight in self.parts
        )
        return torch.stack(list(ranked)).sum(0)

    def score_block(self, inputs: BlockInput) -> Tensor:
        """(B, T) float32 from what reaches block number `layer`."""
        total = torch.zeros(inputs.input_ids.shape, device=inputs.hidden.device)
        for scorer, weight in self.parts:
            if isinstance(scorer, EarlyScorer):
                part = scorer.score_block(inputs)
            else:
                part = scorer.scores(None, inputs.input_ids, inputs.attention_mask)
            total += weight * ranks(part, inputs.attention_mask)
        return total


def ranks(scores: Tensor, attention_mask: Tensor) -> Tensor:
    """(B, T) float32: the share of the row's real tokens that score lower; equal scores share one rank."""
    scores = scores.float().masked_fill(attention_mask == 0, -torch.inf)
    ordered = scores.sort(dim=-1).values
    below = torch.searchsorted(ordered, scores) - (attention_mask == 0).sum(-1, keepdim=True)
    return below.clamp_min(0) / attention_mask.sum(-1, keepdim=True).clamp_min(1)
