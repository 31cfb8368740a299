"""Codecs `fp32` and `fp16`: every coordinate as a float of that size.

`fp32` is the reference of every ratio (FedAvg-LoRA), `fp16` the usual cheap halving of it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ...errors import BudgetError, MessageError, NonFiniteError
from ..codec import CodecContext, Encoded, SparseUpdate, read_delta, register
from ..schema import Schema


@register("fp32")
class Fp32Codec:
    """Lossless. Payload: num_params little-endian float32, in coordinate order."""

    name = "fp32"
    unbiased = True

    def encode(
        self,
        delta: Mapping[str, Tensor],
        fisher: Mapping[str, Tensor] | None = None,
        *,
        max_bytes: int | None = None,
        context: CodecContext | None = None,
    ) -> Encoded:
        """Code all of `delta`; `fisher` is not used. Raises BudgetError if the vector exceeds `max_bytes`."""
        schema, vector = read_delta(delta)
        return Encoded(_encode(vector, "<f4", max_bytes), SparseUpdate(schema.num_params, None, vector))

    def decode(self, payload: bytes, schema: Schema, context: CodecContext | None = None) -> SparseUpdate:
        """Dense update; raises MessageError on a wrong length or non-finite values."""
        return _decode(payload, schema, "<f4")


@register("fp16")
class Fp16Codec:
    """Payload: num_params little-endian IEEE float16, in coordinate order. Refuses updates beyond +-65504."""

    name = "fp16"
    unbiased = False

    def encode(
        self,
        delta: Mapping[str, Tensor],
        fisher: Mapping[str, Tensor] | None = None,
        *,
        max_bytes: int | None = None,
        context: CodecContext | None = None,
    ) -> Encoded:
        """Code all of `delta`; `fisher` is not used. Raises BudgetError if the vector exceeds `max_bytes`."""
        schema, vector = read_delta(delta)
        rounded = vector.half().float()
        if not bool(torch.isfinite(rounded).all()):
            largest = float(vector.abs().max())
            raise NonFiniteError(f"update reaches {largest:.3g}, beyond float16's 65504; use codec 'fp32'")
        return Encoded(_encode(rounded, "<f2", max_bytes), SparseUpdate(schema.num_params, None, rounded))

    def decode(self, payload: bytes, schema: Schema, context: CodecContext | None = None) -> SparseUpdate:
        """Dense update; raises MessageError on a wrong length or non-finite values."""
        return _decode(payload, schema, "<f2")


def _encode(vector: Tensor, dtype: str, max_bytes: int | None) -> bytes:
    """Every coordinate as little-endian `dtype` ("<f4" or "<f2"). Raises BudgetError if that exceeds `max_bytes`."""
    size = vector.numel() * np.dtype(dtype).itemsize
    if max_bytes is not None and size > max_bytes:
        raise BudgetError(
            f"a dense update of {vector.numel()} parameters takes {size} bytes, the budget is {max_bytes}; "
            f'give at least "{size}B" or use codec "fstq", which fits any budget'
        )
    return vector.numpy().astype(dtype).tobytes()


def _decode(payload: bytes, schema: Schema, dtype: str) -> SparseUpdate:
    """Inverse of `_encode`. Raises MessageError on a wrong length or non-finite values."""
    expected = schema.num_params * np.dtype(dtype).itemsize
    if len(payload) != expected:
        raise MessageError(f"dense payload has {len(payload)} bytes; expected {expected} for this adapter")
    values = np.frombuffer(payload, dtype=dtype).astype(np.float32)
    if not np.isfinite(values).all():  # torch's takes twice the memory of the values
        raise MessageError("dense payload holds NaN or infinity; expected finite values")
    return SparseUpdate(schema.num_params, None, torch.from_numpy(values))
