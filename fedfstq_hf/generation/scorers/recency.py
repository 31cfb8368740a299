"""Recency: keep the end of the prompt. With the first tokens, which are always kept: sinks and a sliding window."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Recency:
    """Score = position (StreamingLLM, arXiv 2309.17453, applied to the prompt). For comparison."""

    def scores(self, model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, T) float32, higher = keep."""
        return torch.arange(input_ids.shape[1], device=input_ids.device).float().expand(input_ids.shape)
