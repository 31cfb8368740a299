"""Error feedback: what a message did not carry is added to the client's next update.

Kept as flat vectors so that the caller decides when a residual is committed: only after its update was accepted.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..errors import ConfigError
from .update import SparseUpdate


@dataclass(frozen=True)
class ErrorFeedback:
    """Residual `r' = (delta + decay * r) - sent`. decay 1 forgets nothing, 0 switches error feedback off."""

    decay: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.decay <= 1.0:
            raise ConfigError(f"error feedback decay is {self.decay!r}; expected a number from 0 (off) to 1 (keep all)")

    def corrected(self, delta: Tensor, residual: Tensor | None) -> Tensor:
        """What to encode: `delta + decay * residual`, a new vector (num_params,). residual None: first round."""
        if residual is None or self.decay == 0.0:
            return delta.clone()
        return delta + self.decay * residual

    def after(self, corrected: Tensor, sent: SparseUpdate) -> Tensor:
        """Residual once `sent` was accepted: `corrected - sent`, a new vector (num_params,).

        If the update was refused or lost, the residual stays what it was before: the next `delta` replaces this one.
        """
        residual = corrected.clone()
        sent.add_to(residual, -1.0)
        return residual
