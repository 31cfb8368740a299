"""Codec `fstq`: sparse sign factors and single coordinates, whichever saves more weighted distortion per bit.

Both are chosen at one price per bit (tradeoff.py): factors of each matrix first (factors.py), then the coordinates that
these leave worst (selection.py), until the budget is full to the byte.

Payload: one ANS stream (see entropy.py; trailing zero bytes cut), read in this order. There is no framing: counts and
alphabets follow from the schema and from what was read before.

| symbols | model | meaning |
|---|---|---|
| 1 | uniform, 16 | kind k, 1 to 9: k mod 5 = 0 for no coordinates, 1 to 4 for 1, 2, 4, 8 levels; k >= 5: with factors |
| | see components.py (if with factors) | sign factors |
| | see coordinates.py (if any) | coordinates, added to what the factors give |
| | 1 bit each | the tail: signs of the factors, then of the coordinates |

An empty update is an empty payload.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from ..errors import ConfigError
from . import fstq_stream
from .budget import check_empty_fits
from .coordinates import LEVELS
from .fstq_encoder import Encoder, Levels, Parts
from .registry import CodecContext, Encoded, register
from .schema import Schema
from .stacks import POWERS, Source, one_thread
from .update import SparseUpdate

_LEAST_BYTES = 64


@register("fstq")
class FstqCodec:
    """Rate-distortion optimised under the Fisher information; fits any budget.

    parts: "auto" (factors and coordinates), "factors" or "coordinates". levels: magnitudes of coordinates per matrix,
    "auto", 1, 2, 4 or 8. fisher_power: squared errors weigh F to this power, 0.25, 0.375, 0.5, 0.75 or 1; the lower,
    the less it trusts the extremes of a noisy estimate. bits: per parameter, where no `max_bytes` is given (64 bytes at
    least).
    """

    name = "fstq"

    def __init__(
        self, parts: Parts = "auto", levels: Levels = "auto", fisher_power: float = 0.375, bits: float = 0.2
    ) -> None:
        if parts not in ("auto", "factors", "coordinates"):
            raise ConfigError(f'fstq parts is {parts!r}; expected "auto", "factors" or "coordinates"')
        if levels not in ("auto", *LEVELS) or isinstance(levels, (bool, float)):
            raise ConfigError(f'fstq levels is {levels!r}; expected "auto", 1, 2, 4 or 8')
        if isinstance(fisher_power, bool) or fisher_power not in POWERS:
            raise ConfigError(f"fstq fisher_power is {fisher_power!r}; expected 0.25, 0.375, 0.5, 0.75 or 1")
        if isinstance(bits, bool) or not isinstance(bits, (int, float)) or not 0.0 < bits <= 32.0:
            raise ConfigError(f"fstq bits is {bits!r}; expected bits per parameter above 0 and at most 32, such as 0.2")
        self.parts = parts
        self.levels = levels
        self.fisher_power = fisher_power
        self.bits = bits

    def encode(
        self,
        delta: Mapping[str, Tensor],
        fisher: Mapping[str, Tensor] | None = None,
        *,
        max_bytes: int | None = None,
        context: CodecContext | None = None,
    ) -> Encoded:
        """Code what matters most. Raises BudgetError if `max_bytes` is negative."""
        schema = Schema.from_state_dict(delta)
        if max_bytes is None:
            max_bytes = max(_LEAST_BYTES, math.ceil(self.bits * schema.num_params / 8))
        check_empty_fits(0, max_bytes)
        with one_thread() as threads:
            source = Source(schema, delta, fisher, self.fisher_power)
            best = Encoder(source, max_bytes, self.parts, self.levels, threads).run()
        return Encoded(best.payload, best.update)

    def decode(self, payload: bytes, schema: Schema, context: CodecContext | None = None) -> SparseUpdate:
        """Dense update if there are factors, otherwise sparse. Raises MessageError on any malformed payload."""
        with one_thread():
            return fstq_stream.read(payload, schema)
