"""Codec `topk`: the largest magnitudes with their indices, every index bit counted.

Sparsification as in Aji and Heafield (arXiv 1704.05021) and Stich et al. (arXiv 1809.07599), the latter with error
feedback; n coordinates cost ceil(log2 n) bits per index.

| bytes | content |
|---|---|
| 1 | v, bits per value: 32 (float32), 16 (float16), 8 or 4 |
| 4 | k, little-endian uint32, 1 .. ceil(n / 4) |
| ceil(k * w / 8) | indices, strictly ascending, w = max(1, ceil(log2 n)) bits each |
| 4 | only if v < 16: largest magnitude m, float32 little-endian |
| ceil(k * v / 8) | values, little-endian; if v < 16 integers q + Q, Q = 2^(v-1) - 1, standing for q * m / Q |

An empty update is an empty payload.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...errors import BudgetError, ConfigError, MessageError, NonFiniteError
from ..codec import CodecContext, Encoded, SparseUpdate, read_delta, register
from ..coding.allocation import strongest
from ..coding.bits import pack_bits, packed_bytes, read_floats, unpack_bits
from ..schema import Schema

_VALUE_BITS = (32, 16, 8, 4)
_FLOATS = {32: "<f4", 16: "<f2"}


@register("topk")
class TopkCodec:
    """Magnitude top-k. value_bits: 32, 16, 8 or 4 per value.

    density: share sent where no `max_bytes` is given; at most 1/4, also with it: beyond, dense codecs are smaller.
    """

    name = "topk"
    unbiased = False

    def __init__(self, density: float = 0.01, value_bits: int = 32) -> None:
        if isinstance(density, bool) or not isinstance(density, (int, float)) or not 0.0 < density <= 0.25:
            raise ConfigError(f"topk density is {density!r}; expected a share above 0 and at most 0.25, such as 0.01")
        if type(value_bits) is not int or value_bits not in _VALUE_BITS:
            raise ConfigError(f"topk value_bits is {value_bits!r}; expected 32, 16, 8 or 4")
        self.density, self.value_bits = density, value_bits

    def encode(
        self,
        delta: Mapping[str, Tensor],
        fisher: Mapping[str, Tensor] | None = None,
        *,
        max_bytes: int | None = None,
        context: CodecContext | None = None,
    ) -> Encoded:
        """Code as many of the largest as fit; `fisher` is not used. Raises BudgetError if `max_bytes` is negative."""
        schema, vector = read_delta(delta)
        num_params = schema.num_params
        if max_bytes is not None and max_bytes < 0:
            raise BudgetError(
                f"the budget leaves {max_bytes} bytes of payload; raise it by at least {-max_bytes} bytes"
            )
        count = max(1, round(self.density * num_params)) if max_bytes is None else self._most(num_params, max_bytes)
        indices = np.sort(strongest(vector.abs().numpy(), count))
        if not indices.size:
            return Encoded(b"", _update(num_params, indices, np.zeros(0, dtype=np.float32)))
        values, coded = _code(vector.numpy()[indices], self.value_bits)
        head = bytes([self.value_bits]) + indices.size.to_bytes(4, "little")
        payload = head + pack_bits(indices, _index_bits(num_params)) + coded
        return Encoded(payload, _update(num_params, indices, values))

    def decode(self, payload: bytes, schema: Schema, context: CodecContext | None = None) -> SparseUpdate:
        """Sparse update of at most the schema's size. Raises MessageError on any malformed payload."""
        num_params = schema.num_params
        if not payload:
            return _update(num_params, np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32))
        value_bits, count = payload[0], int.from_bytes(payload[1:5], "little")
        if value_bits not in _VALUE_BITS or len(payload) < 5 or not 1 <= count <= _limit(num_params):
            raise MessageError(
                f"topk payload says {count} values of {value_bits} bits; expected up to {_limit(num_params)} of 32, "
                "16, 8 or 4"
            )
        expected = _size(num_params, count, value_bits)
        if len(payload) != expected:
            raise MessageError(f"topk payload has {len(payload)} bytes; expected {expected} for {count} values")
        body = 5 + packed_bytes(count, _index_bits(num_params))
        indices = unpack_bits(memoryview(payload)[5:body], count, _index_bits(num_params))
        if indices[-1] >= num_params or (indices[1:] <= indices[:-1]).any():
            raise MessageError("topk payload holds indices that do not ascend, or lie beyond the adapter")
        return _update(num_params, indices, _decode(memoryview(payload)[body:], count, value_bits))

    def _most(self, num_params: int, max_bytes: int) -> int:
        count = max(0, 8 * (max_bytes - 5) // (_index_bits(num_params) + self.value_bits))
        while count and _size(num_params, count, self.value_bits) > max_bytes:
            count -= 1
        return min(count, _limit(num_params))


def _limit(num_params: int) -> int:
    return -(-num_params // 4)


def _index_bits(num_params: int) -> int:
    return max(1, (num_params - 1).bit_length())


def _size(num_params: int, count: int, value_bits: int) -> int:
    scale = 0 if value_bits in _FLOATS else 4
    return 5 + packed_bytes(count, _index_bits(num_params)) + scale + packed_bytes(count, value_bits)


def _code(values: npt.NDArray[np.float32], value_bits: int) -> tuple[npt.NDArray[np.float32], bytes]:
    """What `values` decode to, and their bytes."""
    if value_bits in _FLOATS:
        with np.errstate(over="ignore"):
            rounded = values.astype(_FLOATS[value_bits])
        if not np.isfinite(rounded).all():
            raise NonFiniteError(
                f"update reaches {np.abs(values).max():.3g}, beyond float16; set topk value_bits to 32"
            )
        return rounded.astype(np.float32), rounded.tobytes()
    largest, steps = np.abs(values).max(), (1 << (value_bits - 1)) - 1
    levels = np.rint(values.astype(np.float64) * (steps / float(largest))).astype(np.int64)
    coded = largest.astype("<f4").tobytes() + pack_bits(levels + steps, value_bits)
    return _points(largest, value_bits)[levels + steps], coded


def _decode(data: memoryview, count: int, value_bits: int) -> npt.NDArray[np.float32]:
    if value_bits in _FLOATS:
        values = np.frombuffer(data, dtype=_FLOATS[value_bits]).astype(np.float32)
        if not np.isfinite(values).all():
            raise MessageError("topk payload holds NaN or infinity; expected finite values")
        return values
    points = _points(read_floats(data[:4], 1, "scale")[0], value_bits)
    levels = unpack_bits(data[4:], count, value_bits, np.int16)
    if levels.max() >= points.size:
        raise MessageError(f"topk payload holds a level of {levels.max()}; expected at most {points.size - 1}")
    decoded: npt.NDArray[np.float32] = points[levels]
    return decoded


def _points(largest: np.float32, value_bits: int) -> npt.NDArray[np.float32]:
    steps = (1 << (value_bits - 1)) - 1
    points: npt.NDArray[np.float32] = np.arange(-steps, steps + 1, dtype=np.float32) / np.float32(steps) * largest
    return points


def _update(num_params: int, indices: npt.NDArray[np.int64], values: npt.NDArray[np.float32]) -> SparseUpdate:
    return SparseUpdate(num_params, torch.from_numpy(indices), torch.from_numpy(values))
