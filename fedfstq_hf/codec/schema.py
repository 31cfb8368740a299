"""The coordinate order of an adapter: sorted tensor names, laid end to end in one flat float32 vector.

Both sides of a message hold the adapter, so a message carries no names or shapes, only the schema's fingerprint.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..errors import AdapterMismatchError


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of the adapter: coordinates `offset .. offset + size` of the flat vector, row-major."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int
    size: int


@dataclass(frozen=True)
class Schema:
    """Names, shapes and dtypes of an adapter, in coordinate order (names sorted as Python strings)."""

    tensors: tuple[TensorSpec, ...]

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> Schema:
        """Read the schema off a state dict. Raises AdapterMismatchError if it is empty or holds non-float tensors."""
        if not state:
            raise AdapterMismatchError("the adapter has no tensors; expected the LoRA weights of a PEFT model")
        specs, offset = [], 0
        for name in sorted(state):
            tensor = state[name]
            if not tensor.dtype.is_floating_point:
                raise AdapterMismatchError(f"adapter tensor {name!r:.120} is {tensor.dtype}; expected floating point")
            dtype = str(tensor.dtype).removeprefix("torch.")
            specs.append(TensorSpec(name, tuple(tensor.shape), dtype, offset, tensor.numel()))
            offset += tensor.numel()
        return cls(tuple(specs))

    @cached_property
    def num_params(self) -> int:
        """Number of coordinates."""
        return sum(spec.size for spec in self.tensors)

    @cached_property
    def fingerprint(self) -> str:
        """Hex sha256 over canonical JSON of [[name, shape, dtype], ...] in coordinate order."""
        rows = [[spec.name, list(spec.shape), spec.dtype] for spec in self.tensors]
        return hashlib.sha256(json.dumps(rows, separators=(",", ":")).encode()).hexdigest()

    def flatten(self, state: Mapping[str, Tensor]) -> Tensor:
        """Copy a state dict into one CPU float32 vector of shape (num_params,), in coordinate order.

        Raises AdapterMismatchError if names or shapes differ from the schema's. The dtype may differ: a delta is
        float32 also where the adapter is bfloat16.
        """
        self.check(state)
        parts = [state[spec.name].detach().reshape(-1) for spec in self.tensors]
        return torch.cat([part.to(device="cpu", dtype=torch.float32) for part in parts])

    def check(self, state: Mapping[str, Tensor]) -> None:
        """Raise AdapterMismatchError unless a state dict has the schema's names and shapes."""
        self._check_names(state)
        for spec in self.tensors:
            if tuple(state[spec.name].shape) != spec.shape:
                raise AdapterMismatchError(
                    f"adapter tensor {spec.name!r} has shape {tuple(state[spec.name].shape)}; expected {spec.shape}"
                )

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """Views into `vector` (num_params,), by name, in coordinate order, each with its tensor's shape."""
        if tuple(vector.shape) != (self.num_params,):
            raise AdapterMismatchError(
                f"adapter vector has shape {tuple(vector.shape)}; expected ({self.num_params},) for this schema"
            )
        return {spec.name: vector[spec.offset : spec.offset + spec.size].view(spec.shape) for spec in self.tensors}

    def _check_names(self, names: Iterable[str]) -> None:
        given, expected = set(names), {spec.name for spec in self.tensors}
        if given != expected:
            missing, extra = sorted(expected - given), sorted(given - expected)
            raise AdapterMismatchError(
                f"adapter tensors do not match the schema: {len(missing)} missing {missing[:3]!s:.300}, "
                f"{len(extra)} unexpected {extra[:3]!s:.300}; use the federation's base model and LoRA configuration"
            )
