"""The coordinate order of an adapter: sorted tensor names, laid end to end in one flat float32 vector.

Both sides of a message hold the adapter, so a message carries no names or shapes, only the schema's fingerprint.

A `TrainedPart` is those of an adapter's tensors that a federation trains: only their changes travel, the others stay as
round 0 has them. With LoRA's A frozen (FFA-LoRA, Sun et al. 2024, https://arxiv.org/abs/2403.12313) a message carries
the changes of B alone: half the coordinates, and the mean of the clients' products B A is the product of the mean.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..errors import AdapterMismatchError, ConfigError


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

    def digest(self, vector: Tensor) -> str:
        """Hex sha256 of the fingerprint and of an adapter's little-endian float32, (num_params,): a message's base."""
        numbers = vector.detach().cpu().contiguous().numpy().astype("<f4", copy=False)
        return hashlib.sha256(b"fedfstq adapter\n" + bytes.fromhex(self.fingerprint) + numbers.tobytes()).hexdigest()

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


_LORA_A, _LORA_B = ".lora_A.", ".lora_B."


def is_lora_a(name: str) -> bool:
    """Whether a tensor of PEFT's state dict is the factor A of a LoRA."""
    return _LORA_A in name


def is_lora_b(name: str) -> bool:
    """Whether a tensor of PEFT's state dict is the factor B of a LoRA."""
    return _LORA_B in name


def as_lora_b(name: str) -> str:
    """The name of the factor B that belongs to a factor A."""
    return name.replace(_LORA_A, _LORA_B)


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
