"""Which of an adapter's tensors a federation trains: only their changes travel, the others stay as round 0 has them.

With LoRA's A frozen (FFA-LoRA, Sun et al. 2024, https://arxiv.org/abs/2403.12313) a message carries the changes of B
alone: half the coordinates, and the mean of the clients' products B A is the product of the mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedfstq_hf.codec import Schema
from fedfstq_hf.errors import ConfigError

_LORA_A = ".lora_A."


def is_lora_a(name: str) -> bool:
    """Whether a tensor of PEFT's state dict is the factor A of a LoRA."""
    return _LORA_A in name


@dataclass(frozen=True)
class TrainedPart:
    """The part of an adapter that is trained; messages, residuals and means have its coordinates.

    Attributes:
        whole: names and shapes of the larger one.
        schema: of the part; the same object if the part is all.
    """

    whole: Schema
    schema: Schema

    @classmethod
    def of(cls, whole: Schema, *, freeze_a: bool) -> TrainedPart:
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
        shapes = {spec.name: torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device="meta") for spec in kept}
        return cls(whole, Schema.from_state_dict(shapes))

    @property
    def everything(self) -> bool:
        """Whether the part is all."""
        return self.schema is self.whole

    def take(self, vector: Tensor) -> Tensor:
        """The part of a vector (whole.num_params,): (schema.num_params,); the vector itself if that is all."""
        if self.everything:
            return vector
        tensors = self.whole.unflatten(vector)
        return torch.cat([tensors[spec.name].reshape(-1) for spec in self.schema.tensors])

    def put(self, part: Tensor) -> Tensor:
        """The vector (whole.num_params,) with `part` (schema.num_params,) in its place and zeros elsewhere."""
        if self.everything:
            return part
        vector = torch.zeros(self.whole.num_params, dtype=part.dtype, device="cpu")
        tensors = self.whole.unflatten(vector)
        for name, tensor in self.schema.unflatten(part).items():
            tensors[name].copy_(tensor)
        return vector
