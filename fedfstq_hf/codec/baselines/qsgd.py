"""Codecs `qsgd` and `fedpaq`: unbiased stochastic rounding to levels of a norm.

QSGD (Alistarh et al., NeurIPS 2017, arXiv 1610.02132, section 3.1): Q(v_i) = ||v|| * sgn(v_i) * xi_i with xi_i = l/s or
(l+1)/s, drawn so that E[Q(v)] = v. Buckets and the maximum norm as in its experiments (section 4). b bits per
coordinate give s = 2^(b-1) - 1.

| bytes | content of `qsgd` |
|---|---|
| 1 | b, 2 .. 8 |
| 4 | bucket size d, little-endian uint32, at least 8 |
| 4 * ceil(n / d) | norm of each bucket, float32 little-endian |
| ceil(n * b / 8) | signed level + s of each coordinate, b bits each; 2^b - 1 is refused |

FedPAQ (Reisizadeh et al., AISTATS 2020, arXiv 1909.13014) is periodic averaging and partial participation, which a
federation does anyway, plus the low-precision quantiser of its example 1: the same with one norm ||x||_2 for the whole
vector. How levels become bits it leaves open; most are zero, so they get the entropy coder here, which is generous.

| bytes | content of `fedpaq` |
|---|---|
| 1 | s, 1 .. 127 |
| 4 | norm, float32 little-endian |
| rest | one ANS stream (entropy.py): 2 s + 1 frequency weights (uniform, 65536), then signed level + s per coordinate |
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...errors import ConfigError, MessageError, NonFiniteError
from ..codec import CodecContext, Encoded, SparseUpdate, read_delta, register, runs
from ..coding.bits import Float64, check_fits, draws, pack_bits, packed_bytes, read_floats, unpack_bits
from ..coding.entropy import Reader, Writer, table, uniform
from ..schema import Schema

_MAX_BITS = 8
_MIN_BUCKET, _MAX_BUCKET = 8, 2**32 - 1
_MAX_LEVELS = 127
_WEIGHTS = 1 << 16


@register("qsgd")
class QsgdCodec:
    """QSGD with fixed-width levels.

    bits: per coordinate, sign included (2 .. 8). bucket: coordinates that share a norm (at least 8). norm: "l2" as in
    the analysis or "max" as in the paper's experiments. seed: of the rounding, with the round and the update itself.
    """

    name = "qsgd"
    unbiased = True

    def __init__(self, bits: int = 4, bucket: int = 512, norm: Literal["l2", "max"] = "max", seed: int = 0) -> None:
        if type(bits) is not int or not 2 <= bits <= _MAX_BITS:
            raise ConfigError(f"qsgd bits is {bits!r}; expected an integer from 2 to {_MAX_BITS}")
        if type(bucket) is not int or not _MIN_BUCKET <= bucket <= _MAX_BUCKET:
            raise ConfigError(f"qsgd bucket is {bucket!r}; expected an integer from 8 to 2**32 - 1, such as 512")
        if norm not in ("l2", "max"):
            raise ConfigError(f'qsgd norm is {norm!r}; expected "l2" or "max"')
        if type(seed) is not int:
            raise ConfigError(f"qsgd seed is {seed!r}; expected an integer")
        self.bits, self.bucket, self.norm, self.seed = bits, bucket, norm, seed

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
        check_fits(
            "qsgd", self._size(schema.num_params), max_bytes, f'lower its bits from {self.bits}, or use codec "fstq"'
        )
        scale = bucket_norms(vector.numpy().astype(np.float64), self.bucket, self.norm)
        levels = stochastic_levels(
            vector.numpy().astype(np.float64),
            scale.astype(np.float64)[np.arange(schema.num_params) // self.bucket],
            _steps(self.bits),
            draws(vector, self.seed, context.round if context else 0),
        )
        head = bytes([self.bits]) + self.bucket.to_bytes(4, "little") + scale.astype("<f4").tobytes()
        payload = head + pack_bits(levels + _steps(self.bits), self.bits)
        return Encoded(payload, _update(levels, scale, self.bucket, _steps(self.bits)))

    def decode(self, payload: bytes, schema: Schema, context: CodecContext | None = None) -> SparseUpdate:
        """Dense update, each coordinate at most its bucket's norm. Raises MessageError on any malformed payload."""
        if len(payload) < 5:
            raise MessageError(f"qsgd payload has {len(payload)} bytes; expected at least 5")
        bits, bucket = payload[0], int.from_bytes(payload[1:5], "little")
        if not 2 <= bits <= _MAX_BITS or bucket < _MIN_BUCKET:
            raise MessageError(f"qsgd payload says {bits} bits and buckets of {bucket}; expected 2 to 8 and at least 8")
        buckets = -(-schema.num_params // bucket)
        body = 5 + 4 * buckets
        if len(payload) != body + packed_bytes(schema.num_params, bits):
            raise MessageError(
                f"qsgd payload has {len(payload)} bytes; expected {body + packed_bytes(schema.num_params, bits)}"
            )
        scale = read_floats(memoryview(payload)[5:body], buckets, "norm")
        raised = unpack_bits(memoryview(payload)[body:], schema.num_params, bits, np.uint8)
        if raised.max(initial=0) > 2 * _steps(bits):
            raise MessageError(f"qsgd payload holds a level above {_steps(bits)}")
        levels = raised.view(np.int8)
        levels -= np.int8(_steps(bits))
        return _update(levels, scale, bucket, _steps(bits))

    def _size(self, num_params: int) -> int:
        return 5 + 4 * -(-num_params // self.bucket) + packed_bytes(num_params, self.bits)


@register("fedpaq")
class FedpaqCodec:
    """FedPAQ's quantiser. levels: s (1 .. 127). seed: of the rounding, together with the round and the update."""

    name = "fedpaq"
    unbiased = True

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
        return Encoded(payload, _update_of_levels(symbols, norm.max(initial=0), self.levels))

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
        return _update_of_levels(symbols, norm[0], levels)


def _update_of_levels(symbols: npt.NDArray[np.integer[Any]], norm: np.float32, levels: int) -> SparseUpdate:
    points = np.arange(-levels, levels + 1, dtype=np.float32) / np.float32(levels) * np.float32(norm)
    values = np.empty(symbols.size, dtype=np.float32)
    for start, end in runs(0, symbols.size):
        values[start:end] = points[symbols[start:end]]
    return SparseUpdate(symbols.size, None, torch.from_numpy(values))


def bucket_norms(values: Float64, bucket: int, norm: str) -> npt.NDArray[np.float32]:
    """Norm of each run of `bucket` values, float32. Raises NonFiniteError if one exceeds float32."""
    starts = np.arange(0, values.size, bucket)
    if not starts.size:
        return np.zeros(0, dtype=np.float32)
    if norm == "max":
        scale: Float64 = np.maximum.reduceat(np.abs(values), starts)
    else:
        scale = np.sqrt(np.add.reduceat(values * values, starts))
    if scale.max() > np.finfo(np.float32).max:
        raise NonFiniteError(
            f"a bucket of the update has norm {scale.max():.3g}, beyond float32; scale the update down"
        )
    return scale.astype(np.float32)


def stochastic_levels(values: Float64, scale: Float64, steps: int, uniform: Float64) -> npt.NDArray[np.int64]:
    """Signed levels -steps .. steps of values / scale, rounded up where `uniform` lies below the fraction."""
    ratio = np.divide(np.abs(values) * steps, scale, out=np.zeros_like(values), where=scale > 0)
    lower = np.floor(ratio)
    level = np.minimum(lower + (uniform < ratio - lower), steps)
    signed: npt.NDArray[np.int64] = np.where(values < 0, -level, level).astype(np.int64)
    return signed


def _steps(bits: int) -> int:
    return int((1 << (bits - 1)) - 1)


def _update(
    levels: npt.NDArray[np.signedinteger], scale: npt.NDArray[np.float32], bucket: int, steps: int
) -> SparseUpdate:
    values = levels.astype(np.float32)
    values /= np.float32(steps)
    whole = values.size // bucket * bucket
    values[:whole].reshape(-1, bucket)[:] *= scale[: values.size // bucket, None]
    values[whole:] *= scale[-1:]
    return SparseUpdate(values.size, None, torch.from_numpy(values))
