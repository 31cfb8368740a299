"""Codec `fp32`: every coordinate as float32, the reference of every ratio (FedAvg-LoRA)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..dense import decode_dense, encode_dense, read_delta
from ..registry import CodecContext, Encoded, register
from ..schema import Schema
from ..update import SparseUpdate


@register("fp32")
class Fp32Codec:
    """Lossless. Payload: num_params little-endian float32, in coordinate order."""

    name = "fp32"

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
        return Encoded(encode_dense(vector, "<f4", max_bytes), SparseUpdate(schema.num_params, None, vector))

    def decode(self, payload: bytes, schema: Schema, context: CodecContext | None = None) -> SparseUpdate:
        """Dense update; raises MessageError on a wrong length or non-finite values."""
        return decode_dense(payload, schema, "<f4")
