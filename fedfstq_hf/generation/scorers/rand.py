"""Random: what any scorer has to beat."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


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
