"""The table learned in training: how strongly the loss reacted to each token id (Fed-FSTQ stage 1)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fedfstq_hf.errors import ConfigError


class TokenTable:
    """Score = the table's entry of the token id. It knows nothing of the question that a prompt ends with.

    table: (vocab_size,) float, higher is more sensitive, +inf for ids never seen in training (kept first), as
    `TokenSensitivity.scores()` and `Saliency.scores()` return it.
    """

    def __init__(self, table: Tensor) -> None:
        if table.ndim != 1 or not table.numel():
            raise ConfigError(f"table has shape {tuple(table.shape)}; expected (vocab_size,)")
        self.table = table.detach().float().cpu()

    def scores(self, model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, T) float32, higher = keep. Raises ConfigError for ids outside the table."""
        highest = int(input_ids.max())
        if highest >= len(self.table):
            raise ConfigError(
                f"token id {highest} is outside the table of {len(self.table)} ids; the table belongs to another "
                "tokenizer"
            )
        return self.table.to(input_ids.device)[input_ids]
