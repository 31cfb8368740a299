"""Codec `fedbat`: FedBAT's one-bit message, plus or minus a step size per tensor (Li et al., ICML 2024).

Binarisation (arXiv 2408.03215, section 3): x becomes +alpha with probability clip((x / alpha + 1) / 2, 0, 1), else
-alpha; unbiased within +-alpha. The paper learns alpha during training, from the start mean |x|, which is the alpha
taken here; an update that training has already binarised to +-alpha goes through unchanged. Payload: onebit.py.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from ...errors import ConfigError
from ..dense import read_delta
from ..registry import CodecContext, Encoded, register
from ..schema import Schema
from ..update import SparseUpdate
from . import onebit
from .bits import draws


@register("fedbat")
class FedbatCodec:
    """Stochastic signs. seed: of the binarisation, together with the round and the update itself."""

    name = "fedbat"

    def __init__(self, seed: int = 0) -> None:
        if type(seed) is not int:
            raise ConfigError(f"fedbat seed is {seed!r}; expected an integer")
        self.seed = seed

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
        alpha = onebit.mean_magnitudes(schema, vector.numpy())
        scale = np.repeat(alpha.astype(np.float64), [t.size for t in schema.tensors])
        ratio = np.divide(vector.numpy(), scale, out=np.zeros(schema.num_params), where=scale > 0)
        positive = draws(vector, self.seed, context.round if context else 0) < (ratio + 1) / 2
        return onebit.write(schema, alpha, ~positive)

    def decode(self, payload: bytes, schema: Schema, context: CodecContext | None = None) -> SparseUpdate:
        """Dense update. Raises MessageError on any malformed payload."""
        return onebit.read(self.name, payload, schema)
