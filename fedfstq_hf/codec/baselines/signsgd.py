"""Codec `signsgd`: the sign of every coordinate, times the tensor's mean magnitude.

Signs as in signSGD (Bernstein et al., arXiv 1802.04434), whose message leaves the magnitude to the server's step size;
the scale ||x||_1 / d per tensor is that of EF-signSGD (Karimireddy et al., arXiv 1901.09847, algorithm 1), made for
error feedback. Payload: onebit.py. A zero is sent as positive.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..dense import read_delta
from ..registry import CodecContext, Encoded, register
from ..schema import Schema
from ..update import SparseUpdate
from . import onebit


@register("signsgd")
class SignsgdCodec:
    """Scaled signs: one bit per coordinate and one float32 per tensor."""

    name = "signsgd"

    def encode(
        self,
        delta: Mapping[str, Tensor],
        fisher: Mapping[str, Tensor] | None = None,
        *,
        max_bytes: int | None = None,
        context: CodecContext | None = None,
    ) -> Encoded:
        """Code all of `delta`; `fisher` is not used. Raises BudgetError if that exceeds `max_bytes`."""
        schema, vector = read_delta(delta)
        onebit.check_size(self.name, schema, max_bytes)
        values = vector.numpy()
        return onebit.write(schema, onebit.mean_magnitudes(schema, values), values < 0)

    def decode(self, payload: bytes, schema: Schema, context: CodecContext | None = None) -> SparseUpdate:
        """Dense update. Raises MessageError on any malformed payload."""
        return onebit.read(self.name, payload, schema)
