"""Which of an adapter's tensors a federation trains: only their changes travel, the others stay as round 0 has them.

With LoRA's A frozen (FFA-LoRA, Sun et al. 2024, https://arxiv.org/abs/2403.12313) a message carries the changes of B
alone: half the coordinates, and the mean of the clients' products B A is the product of the mean.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedfstq_hf.codec import Schema
from fedfstq_hf.errors import ConfigError
from fedfstq_hf.federation.part import Part, subschema

_LORA_A = ".lora_A."


def is_lora_a(name: str) -> bool:
    """Whether a tensor of PEFT's state dict is the factor A of a LoRA."""
    return _LORA_A in name


@dataclass(frozen=True)
class Travelling(Part):
    """The part of an adapter that travels; messages, residuals and means have its coordinates."""

    @classmethod
    def of(cls, whole: Schema, *, freeze_a: bool) -> Travelling:
        """All of an adapter, or all but the factors A of its LoRA.

        Raises:
            ConfigError: `freeze_a`, and the adapter has no factor A, or nothing else.
        """
        if not freeze_a:
            return cls(whole, whole)
        kept = [spec for spec in whole.tensors if not is_lora_a(spec.name)]
        if not 0 < len(kept) < len(whole.tensors):
            raise ConfigError(
                "freeze_a freezes LoRA's factors A and trains its factors B; this adapter has no "
                f"{'others' if not kept else 'factor A'} (first tensor: {whole.tensors[0].name}). Use LoRA, or leave "
                "freeze_a out."
            )
        return cls(whole, subschema(kept))
