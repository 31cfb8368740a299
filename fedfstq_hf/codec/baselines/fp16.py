"""Codec `fp16`: every coordinate rounded to IEEE half precision, the usual cheap halving of FedAvg."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...errors import NonFiniteError
from ..dense import decode_dense, encode_dense, read_delta
from ..registry import CodecContext, Encoded, register
from ..schema import Schema
from ..update import SparseUpdate


@register("fp16")
class Fp16Codec:
    """Payload: num_params little-endian IEEE float16, in coordinate order. Refuses updates beyond +-65504."""

    name = "fp16"

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
        return Encoded(encode_dense(rounded, "<f2", max_bytes), SparseUpdate(schema.num_params, None, rounded))

    def decode(self, payload: bytes, schema: Schema, context: CodecContext | None = None) -> SparseUpdate:
        """Dense update; raises MessageError on a wrong length or non-finite values."""
        return decode_dense(payload, schema, "<f2")
