"""Query-aware: the attention that the prompt's last window pays to each token at an early layer. The default."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fedfstq_hf.errors import ConfigError
from fedfstq_hf.generation.attention import window_attention
from fedfstq_hf.generation.blocks import early_scores
from fedfstq_hf.generation.scorer import BlockInput


class QueryAttention:
    """Score = attention of the last `window` tokens at block `layer`: mean over the window, maximum over the heads.

    Tokens within `reach` of a high score share it, since a word's tokens and its neighbours are read together.
    FastV (arXiv 2403.06764) ranks visual tokens at this depth; SnapKV (2404.14469) pools a window's attention, over a
    cache; GemFilter (2409.17422) selects from an early layer and starts again, here the early layers' work is kept.

    layer: 2 of an N-layer model costs 2/N of a dense prefill. window, reach: tokens.
    """

    def __init__(self, layer: int = 2, window: int = 8, reach: int = 2) -> None:
        if layer < 0 or window < 1 or reach < 0:
            raise ConfigError(
                f"layer is {layer}, window {window}, reach {reach}; expected at least 0, 1 and 0, for example "
                "QueryAttention(layer=2, window=8, reach=2)"
            )
        self._layer = layer
        self.window = window
        self.reach = reach

    @property
    def layer(self) -> int:
        """How many blocks see the whole prompt."""
        return self._layer

    def scores(self, model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, T) float32 in [0, 1], higher = keep."""
        return early_scores(self, model, input_ids, attention_mask)

    def score_block(self, inputs: BlockInput) -> Tensor:
        """(B, T) float32 from what reaches block number `layer`."""
        peak = window_attention(inputs, self.window).mean(2).amax(1)  # (B, T)
        if not self.reach:
            return peak
        return F.max_pool1d(peak[:, None], 2 * self.reach + 1, stride=1, padding=self.reach)[:, 0]
