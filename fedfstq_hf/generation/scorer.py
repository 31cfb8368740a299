"""What a scorer is: one score per prompt token, higher = keep. Every scorer is a small file in `scorers/`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn


@runtime_checkable
class Scorer(Protocol):
    """Ranks prompt tokens without gradients. Only the order of scores within a row matters."""

    def scores(self, model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, T) float, higher = keep; what it says of padding is ignored.

        model: the causal LM (`None` is allowed for scorers that do not run it). input_ids, attention_mask: (B, T).
        """
        ...


@dataclass(frozen=True)
class BlockInput:
    """What reaches a decoder block during the prefill of a whole prompt.

    hidden: (B, T, H). rotary: cos and sin, (1 or B, T, D) each, or None for models without rotary positions.
    input_ids, attention_mask: (B, T) of the same tokens, 1 = real token.
    """

    block: nn.Module
    hidden: Tensor
    rotary: tuple[Tensor, Tensor] | None
    input_ids: Tensor
    attention_mask: Tensor


@runtime_checkable
class EarlyScorer(Scorer, Protocol):
    """A scorer that reads the hidden states after the first `layer` decoder blocks.

    `generate()` runs those blocks once, on the whole prompt, and goes on with the kept tokens' hidden states.
    """

    @property
    def layer(self) -> int:
        """How many blocks see the whole prompt."""
        ...

    def score_block(self, inputs: BlockInput) -> Tensor:
        """(B, T) float, higher = keep, from what reaches block number `layer` (counted from 0)."""
        ...
