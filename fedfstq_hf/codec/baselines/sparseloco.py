"""Codec `sparseloco`: top 64 of every 4096 coordinates at 2 bits (Sarfi et al., arXiv 2508.15706; error feedback 0.95).

Each tensor is cut into chunks of 4096 coordinates, in coordinate order (the last one shorter, with its share of the
top k; the authors cut matrices into 64 x 64 blocks). Their quantiser, per tensor: q = round((v - mean) / s) + 2 within
0 .. 3, s = 6 sigma / 4 over the values that are sent, and each q decodes to the mean of its values.

| bytes | content |
|---|---|
| 1 | form: 0 = a byte per value, as the authors' code stores it; 1 = 2 bits, as the paper counts; 2 = entropy-coded |
| 2 | k per 4096, little-endian uint16, 1 .. 1024; a chunk of m coordinates sends ceil(k * m / 4096) |
| 16 * tensors | the four levels of each non-empty tensor, float32 little-endian |
| ceil(12 * sent / 8) | forms 0 and 1: place within the chunk, ascending, 12 bits each |
| sent, or ceil(2 * sent / 8) | forms 0 and 1: level numbers |
| rest | form 2: one ANS stream (entropy.py), see below |

Form 2: gaps between places (geometric with the rate k / 4096), four frequency weights (uniform, 64), level numbers
(categorical). It holds the same symbols as the others. An empty update is an empty payload.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...errors import ConfigError, MessageError
from ..codec import CodecContext, Encoded, SparseUpdate, read_delta, register
from ..coding.allocation import Draft, fill
from ..coding.bits import pack_bits, packed_bytes, unpack_bits
from ..coding.entropy import Reader, Writer, table, uniform
from ..schema import Schema

CHUNK = 4096
MAX_K = 1024  # beyond a quarter, dense codecs are smaller
_INDEX_BITS = 12
_LEVELS = 4
_SIGMAS = 6
_WEIGHTS = 64
_STORED, _PACKED, _CODED = range(3)
Int64 = npt.NDArray[np.int64]


@register("sparseloco")
class SparselocoCodec:
    """Chunked top-k with 2-bit values.

    top_k: per 4096 coordinates where no `max_bytes` is given; with it, the largest that fits. packed: 2 bits
    per value (False: one byte, as the authors' code stores it). entropy_coded: the same symbols, entropy-coded.
    """

    name = "sparseloco"
    unbiased = False

    def __init__(self, top_k: int = 64, packed: bool = True, entropy_coded: bool = False) -> None:
        if type(top_k) is not int or not 1 <= top_k <= MAX_K:
            raise ConfigError(f"sparseloco top_k is {top_k!r}; expected an integer from 1 to {MAX_K}, such as 64")
        for option, value in (("packed", packed), ("entropy_coded", entropy_coded)):
            if not isinstance(value, bool):
                raise ConfigError(f"sparseloco {option} is {value!r}; expected true or false")
        self.top_k = top_k
        self._form = _CODED if entropy_coded else _PACKED if packed else _STORED

    def encode(
        self,
        delta: Mapping[str, Tensor],
        fisher: Mapping[str, Tensor] | None = None,
        *,
        max_bytes: int | None = None,
        context: CodecContext | None = None,
    ) -> Encoded:
        """Code each chunk's largest; `fisher` is not used. Raises BudgetError if `max_bytes` is negative."""
        schema, vector = read_delta(delta)
        if not bool(vector.any()):
            return Encoded(b"", _empty(schema))

        def draft(k: int) -> Draft:
            return self._draft(schema, vector.numpy(), k) if k else Draft(b"", _empty(schema))

        best = (
            draft(self.top_k)
            if max_bytes is None
            else fill(draft, lambda k: 8.0 * _estimate(schema, k, self._form), MAX_K, max_bytes, self.top_k)
        )
        return Encoded(best.payload, best.update)

    def decode(self, payload: bytes, schema: Schema, context: CodecContext | None = None) -> SparseUpdate:
        """Sparse update of at most the schema's size. Raises MessageError on any malformed payload."""
        if not payload:
            return _empty(schema)
        if not schema.num_params:
            raise MessageError(f"sparseloco payload has {len(payload)} bytes for an adapter without coordinates")
        form, k = payload[0], int.from_bytes(payload[1:3], "little")
        if form > _CODED or len(payload) < 3 or not 1 <= k <= MAX_K:
            raise MessageError(f"sparseloco payload says form {form} and k {k}; expected 0 to 2 and 1 to {MAX_K}")
        chunks = Chunks.of(schema, k)
        count, body = int(chunks.sent.sum()), 3 + 4 * _LEVELS * chunks.tensors
        if len(payload) < body:
            raise MessageError(f"sparseloco payload has {len(payload)} bytes; expected at least {body}")
        levels = np.frombuffer(payload[3:body], dtype="<f4").astype(np.float32).reshape(-1, _LEVELS)
        if not np.isfinite(levels).all():
            raise MessageError("sparseloco payload holds a level that is NaN or infinite; expected finite values")
        if form == _CODED:
            reader = Reader(payload[body:])
            places: npt.NDArray[np.integer[Any]] = chunks.places(reader.get(count, _gaps(k)))
            weights = reader.get(_LEVELS, uniform(_WEIGHTS))
            if not weights.any():
                raise MessageError("sparseloco payload gives every level the frequency 0; expected one above 0")
            numbers: npt.NDArray[Any] = reader.get(count, table(weights.tolist()))
            reader.finish()
        else:
            middle = body + packed_bytes(count, _INDEX_BITS)
            places = unpack_bits(memoryview(payload)[body:middle], count, _INDEX_BITS, np.int16)
            numbers = unpack_bits(memoryview(payload)[middle:], count, 8 if form == _STORED else 2, np.uint8)
            if numbers.max() >= _LEVELS:
                raise MessageError(f"sparseloco payload holds level number {numbers.max()}; expected 0 to 3")
        indices = chunks.indices(places)
        values = np.empty(count, dtype=np.float32)
        for mine, of_tensor in zip(chunks.by_tensor(), levels, strict=True):
            values[mine] = of_tensor[numbers[mine]]
        return _update(schema, indices, values)

    def _draft(self, schema: Schema, values: npt.NDArray[np.float32], k: int) -> Draft:
        chunks = Chunks.of(schema, k)
        places = np.concatenate(
            [_top(values[a : a + n], sent) for a, n, sent in zip(chunks.start, chunks.size, chunks.sent, strict=True)]
        )
        indices = chunks.indices(places)
        numbers, levels = np.empty(indices.size, dtype=np.uint8), np.empty((chunks.tensors, _LEVELS), dtype=np.float32)
        sent = np.empty(indices.size, dtype=np.float32)
        for tensor, mine in enumerate(chunks.by_tensor()):
            numbers[mine], levels[tensor] = quantize(values[indices[mine]])
            sent[mine] = levels[tensor][numbers[mine]]
        head = bytes([self._form]) + k.to_bytes(2, "little") + levels.astype("<f4").tobytes()
        if self._form == _CODED:
            writer = Writer()
            writer.put(chunks.gaps(places), _gaps(k))
            share = np.bincount(numbers, minlength=_LEVELS)
            weights = np.ceil(share * (_WEIGHTS - 1) / share.max())
            writer.put(weights, uniform(_WEIGHTS))
            writer.put(numbers, table(weights.tolist()))
            body = writer.finish()
        else:
            body = pack_bits(places, _INDEX_BITS) + pack_bits(numbers, 8 if self._form == _STORED else 2)
        return Draft(head + body, _update(schema, indices, sent))


@dataclass(frozen=True)
class Chunks:
    """All chunks of a schema, in coordinate order: arrays (chunks,) of first coordinate, size, places sent, tensor."""

    start: Int64
    size: Int64
    sent: Int64
    tensor: Int64  # numbers tensors that are not empty
    tensors: int

    @classmethod
    def of(cls, schema: Schema, k: int) -> Chunks:
        """Chunks of a schema whose whole chunks send `k` places each."""
        specs = [spec for spec in schema.tensors if spec.size]
        starts = [np.arange(spec.offset, spec.offset + spec.size, CHUNK) for spec in specs]
        start = np.concatenate(starts)
        end = np.append(start[1:], specs[-1].offset + specs[-1].size)
        size = end - start
        tensor = np.repeat(np.arange(len(specs)), [s.size for s in starts])
        return cls(start, size, -(-k * size // CHUNK), tensor, len(specs))

    def by_tensor(self) -> list[slice]:
        """Where the places of each tensor that is not empty lie among all of them."""
        ends = np.cumsum(np.bincount(self.tensor, weights=self.sent, minlength=self.tensors)).astype(np.int64).tolist()
        return [slice(start, end) for start, end in pairwise([0, *ends])]

    def indices(self, places: npt.NDArray[np.integer[Any]]) -> Int64:
        """Coordinates of places within their chunks. Raises MessageError unless they ascend within each chunk."""
        if (places >= np.repeat(self.size.astype(np.int16), self.sent)).any():
            raise MessageError("sparseloco payload holds a place beyond its chunk")
        indices: Int64 = np.repeat(self.start, self.sent)
        indices += places
        if (indices[1:] <= indices[:-1]).any():
            raise MessageError("sparseloco payload holds places that do not ascend within their chunk")
        return indices

    def gaps(self, places: Int64) -> Int64:
        """Coordinates as numbers of coordinates skipped since the place before, or since the chunk's start."""
        before = np.concatenate([[-1], places[:-1]])
        before[self._firsts()] = -1
        gaps: Int64 = places - before - 1
        return gaps

    def places(self, gaps: npt.NDArray[np.integer[Any]]) -> Int64:
        """Inverse of `gaps`."""
        total = np.cumsum(gaps + 1, dtype=np.int64)
        base = np.concatenate([[0], total])[self._firsts()]
        places: Int64 = total - 1 - np.repeat(base, self.sent)
        return places

    def _firsts(self) -> Int64:
        return np.cumsum(self.sent) - self.sent


def quantize(values: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """Level number of each value, and the four levels: the mean of the values of each number, 0 where there is none."""
    exact = values.astype(np.float64)
    centred = exact - exact.mean()
    sigma = math.sqrt(float((centred * centred).sum()) / max(values.size - 1, 1))
    step = _SIGMAS * sigma / _LEVELS or 1.0
    numbers = np.clip(np.rint(centred / step + _LEVELS // 2), 0, _LEVELS - 1).astype(np.uint8)
    count = np.bincount(numbers, minlength=_LEVELS)
    levels = np.bincount(numbers, weights=exact, minlength=_LEVELS) / np.maximum(count, 1)
    return numbers, levels.astype(np.float32)


def _top(values: npt.NDArray[np.float32], count: int) -> Int64:
    """Ascending places of the `count` largest magnitudes of one chunk, ties to the lower place."""
    place = np.arange(values.size, dtype=np.uint64)
    # one integer per coordinate, magnitude above place: the choice depends on the values alone
    key = np.abs(values).view(np.uint32).astype(np.uint64) << np.uint64(_INDEX_BITS) | (np.uint64(CHUNK - 1) - place)
    top = np.partition(key, values.size - count)[values.size - count :]
    return np.sort(CHUNK - 1 - (top & np.uint64(CHUNK - 1)).astype(np.int64))


def _estimate(schema: Schema, k: int, form: int) -> float:
    """Bytes of a payload; for the coded form an estimate, since level numbers take as many bits as they need."""
    if not k:
        return 0.0
    chunks = Chunks.of(schema, k)
    count, head = int(chunks.sent.sum()), 3 + 4 * _LEVELS * chunks.tensors
    if form != _CODED:
        return head + packed_bytes(count, _INDEX_BITS) + packed_bytes(count, 8 if form == _STORED else 2)
    rate = k / CHUNK
    index = -math.log2(rate) - (1 - rate) / rate * math.log2(1 - rate)
    return head + count * (index + 1.3) / 8


@lru_cache(maxsize=16)
def _gaps(k: int) -> Any:
    """Geometric model of the gaps 0 .. 4095, by its recurrence: only exactly rounded operations."""
    weights = [1.0]
    for _ in range(CHUNK - 1):
        weights.append(weights[-1] * (CHUNK - k) / CHUNK)
    return table(weights)


def _update(schema: Schema, indices: Int64, values: npt.NDArray[np.float32]) -> SparseUpdate:
    return SparseUpdate(schema.num_params, torch.from_numpy(indices), torch.from_numpy(values))


def _empty(schema: Schema) -> SparseUpdate:
    return _update(schema, np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32))
