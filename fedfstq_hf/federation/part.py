"""Some of an adapter's tensors as a vector of their own: what travels of it, or what one message covers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fedfstq_hf.codec import Schema
from fedfstq_hf.codec.schema import TensorSpec


def subschema(tensors: Iterable[TensorSpec]) -> Schema:
    """The schema of an adapter that had these tensors only."""
    return Schema.from_state_dict(
        {spec.name: torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device="meta") for spec in tensors}
    )


@dataclass(frozen=True)
class Part:
    """Some tensors of a larger vector.

    Attributes:
        whole: names and shapes of the larger one.
        schema: of the part; the same object if the part is all.
    """

    whole: Schema
    schema: Schema

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
