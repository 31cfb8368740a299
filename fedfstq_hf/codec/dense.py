"""Shared steps of codecs: read a delta and its Fisher as flat vectors, and send a dense vector in one dtype."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ..errors import BudgetError, ConfigError, MessageError, NonFiniteError
from .schema import Schema
from .update import SparseUpdate


def read_delta(delta: Mapping[str, Tensor]) -> tuple[Schema, Tensor]:
    """Schema and flat CPU float32 vector of a delta. Raises NonFiniteError naming the first bad tensor."""
    schema = Schema.from_state_dict(delta)
    vector = schema.flatten(delta)
    _check_finite(schema, vector, "update")
    return schema, vector


def read_fisher(schema: Schema, fisher: Mapping[str, Tensor] | None) -> Tensor | None:
    """Flat CPU float32 Fisher, or None. Raises NonFiniteError on NaN or infinity, ConfigError on negative entries."""
    if fisher is None:
        return None
    vector = schema.flatten(fisher)
    _check_finite(schema, vector, "Fisher information")
    if vector.numel() and float(vector.min()) < 0:
        raise ConfigError("Fisher information has negative entries; expected means of squared gradients")
    return vector


def encode_dense(vector: Tensor, dtype: str, max_bytes: int | None) -> bytes:
    """Every coordinate as little-endian `dtype` ("<f4" or "<f2"). Raises BudgetError if that exceeds `max_bytes`."""
    size = vector.numel() * np.dtype(dtype).itemsize
    if max_bytes is not None and size > max_bytes:
        raise BudgetError(
            f"a dense update of {vector.numel()} parameters takes {size} bytes, the budget is {max_bytes}; "
            f'give at least "{size}B" or use codec "fstq", which fits any budget'
        )
    return vector.numpy().astype(dtype).tobytes()


def decode_dense(payload: bytes, schema: Schema, dtype: str) -> SparseUpdate:
    """Inverse of `encode_dense`. Raises MessageError on a wrong length or non-finite values."""
    expected = schema.num_params * np.dtype(dtype).itemsize
    if len(payload) != expected:
        raise MessageError(f"dense payload has {len(payload)} bytes; expected {expected} for this adapter")
    values = torch.from_numpy(np.frombuffer(payload, dtype=dtype).astype(np.float32))
    if not bool(torch.isfinite(values).all()):
        raise MessageError("dense payload holds NaN or infinity; expected finite values")
    return SparseUpdate(schema.num_params, None, values)


def _check_finite(schema: Schema, vector: Tensor, what: str) -> None:
    # one reduction on the good path: a sum of zeros is NaN exactly if an entry was NaN or infinite
    if torch.isfinite((vector * 0).sum()):
        return
    for spec in schema.tensors:
        part = vector[spec.offset : spec.offset + spec.size]
        if not bool(torch.isfinite(part).all()):
            raise NonFiniteError(
                f"{what} of tensor {spec.name!r} holds NaN or infinity in {int((~torch.isfinite(part)).sum())} of "
                f"{spec.size} entries; nothing was encoded. Lower the learning rate or skip the step"
            )
