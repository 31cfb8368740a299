"""Codec `fedpaq`: the whole update stochastically rounded to s levels of its norm (Reisizadeh et al., AISTATS 2020).

FedPAQ (arXiv 1909.13014) is periodic averaging and partial participation, which a federation does anyway, plus the
low-precision quantiser of its example 1: Q(x_i) = ||x||_2 * sgn(x_i) * xi_i(x, s), one norm for the whole vector. How
levels become bits it leaves open; most are zero, so they get the entropy coder here, which is generous to it.

| bytes | content |
|---|---|
| 1 | s, 1 .. 127 |
| 4 | norm, float32 little-endian |
| rest | one ANS stream (entropy.py): 2 s + 1 frequency weights (uniform, 65536), then signed level + s per coordinate |
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...errors import ConfigError, MessageError
from ..dense import read_delta
from ..entropy import Reader, Writer, table, uniform
from ..places import runs
from ..registry import CodecContext, Encoded, register
from ..schema import Schema
from ..update import SparseUpdate
from .bits import check_fits, draws, read_floats
from .qsgd import bucket_norms, stochastic_levels

_MAX_LEVELS = 127
_WEIGHTS = 1 << 16


@register("fedpaq")
class FedpaqCodec:
    """FedPAQ's quantiser. levels: s (1 .. 127). seed: of the rounding, together with the round and the update."""

    name = "fedpaq"

    def __init__(self, levels: int = 10, seed: int = 0) -> None:
        if type(levels) is not int or not 1 <= levels <= _MAX_LEVELS:
            raise ConfigError(f"fedpaq levels is {levels!r}; expected an integer from 1 to {_MAX_LEVELS}")
        if type(seed) is not int:
            raise ConfigError(f"fedpaq seed is {seed!r}; expected an integer")
        self.levels, self.seed = levels, seed

    def encode(
        self,
        delta: Mapping[str, Tensor],
        fisher: Mapping[str, Tensor] | None = None,
        *,
        max_bytes: int | None = None,
        context: CodecContext | None = None,
    ) -> Encoded:
        """Code all of `delta`; `fisher` is not used. Raises BudgetError if that exceeds `max_bytes`."""
        vector = read_delta(delta)[1]
        values = vector.numpy().astype(np.float64)
        norm = bucket_norms(values, max(values.size, 1), "l2")
        scale = np.full(values.size, float(norm.max(initial=0)))
        levels = stochastic_levels(
            values, scale, self.levels, draws(vector, self.seed, context.round if context else 0)
        )
        symbols = (levels + self.levels).astype(np.int32)
        counts = np.bincount(symbols, minlength=2 * self.levels + 1)
        counts[self.levels] += not values.size  # an adapter without coordinates still needs a table
        weights = np.ceil(counts * (_WEIGHTS - 1) / counts.max())
        writer = Writer()
        writer.put(weights, uniform(_WEIGHTS))
        writer.put(symbols, table(weights.tolist()))
        payload = bytes([self.levels]) + norm.max(initial=0).astype("<f4").tobytes() + writer.finish()
        check_fits("fedpaq", len(payload), max_bytes, f'lower its levels from {self.levels}, or use codec "fstq"')
        return Encoded(payload, _update(symbols, norm.max(initial=0), self.levels))

    def decode(self, payload: bytes, schema: Schema, context: CodecContext | None = None) -> SparseUpdate:
        """Dense update, each coordinate at most the norm. Raises MessageError on any malformed payload."""
        if len(payload) < 6 or not 1 <= payload[0] <= _MAX_LEVELS:
            raise MessageError(
                f"fedpaq payload of {len(payload)} bytes begins with {payload[:1].hex()!r}; expected 01-7f"
            )
        levels = payload[0]
        norm = read_floats(payload[1:5], 1, "norm")
        reader = Reader(payload[5:])
        weights = reader.get(2 * levels + 1, uniform(_WEIGHTS))
        if not weights.any():
            raise MessageError("fedpaq payload gives every level the frequency 0; expected one above 0")
        symbols = np.empty(schema.num_params, dtype=np.uint8)
        reader.fill(symbols, table(weights.tolist()))
        reader.finish()
        return _update(symbols, norm[0], levels)


def _update(symbols: npt.NDArray[np.integer[Any]], norm: np.float32, levels: int) -> SparseUpdate:
    points = np.arange(-levels, levels + 1, dtype=np.float32) / np.float32(levels) * np.float32(norm)
    values = np.empty(symbols.size, dtype=np.float32)
    for start, end in runs(0, symbols.size):
        values[start:end] = points[symbols[start:end]]
    return SparseUpdate(symbols.size, None, torch.from_numpy(values))
