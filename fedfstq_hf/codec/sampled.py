"""Codec `sampled`: the signs of a random sample of coordinates, scaled so that their mean over clients is unbiased.

What a client sends of a coordinate that is not in its sample is nothing; which ones are follows from a seed in the
message, so they cost no index. The clients of a round draw apart: in their mean every coordinate has a say, and what
one message misses is noise without direction, which training tolerates far better than a part that is never sent.
(Random masks: Konecny et al. 2016, https://arxiv.org/abs/1610.05492, section 2; the magnitude |x|_2^2 / |x|_1, with
which signs keep the length of what they stand for: Vargaftik et al. 2021, https://arxiv.org/abs/2105.08339.)

Payload: one ANS stream (entropy.py), read in this order; an empty update is an empty payload.

| symbols | model | meaning |
|---|---|---|
| 4 | uniform, 256 | seed, the highest byte first |
| 1 | uniform, 65536 | T - 1: coordinate i is in the sample if `ticket(seed, i)` < T |
| non-empty tensors | adaptive, 1025 | 0: nothing of it is sent; else 1 + magnitude, a grid point (8 steps per octave) |
| sampled, of tensors that are sent | 1 bit each | sign (1 = negative), in coordinate order: the stream's tail |
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import ConfigError, MessageError
from .budget import check_empty_fits
from .dense import read_delta
from .entropy import Adaptive, Reader, Writer, uniform
from .places import Places, runs
from .quantization import OCTAVES, grid, nearest
from .registry import CodecContext, Encoded, register
from .schema import Schema
from .update import SparseUpdate

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
_TICKETS = 1 << 16
_STEPS = 8
_SYMBOLS = OCTAVES * _STEPS + 1
_FIRST_BITS = 8  # of one magnitude, before it is known
_TRIES = 6


@register("sampled")
class SampledCodec:
    """Signs of a random sample. bits: per parameter, where no `max_bytes` is given. seed: with the round and update."""

    name = "sampled"

    def __init__(self, bits: float = 0.1, seed: int = 0) -> None:
        if isinstance(bits, bool) or not isinstance(bits, (int, float)) or not 0.0 < bits <= 1.0:
            raise ConfigError(
                f"sampled bits is {bits!r}; expected bits per parameter above 0 and at most 1, such as 0.1"
            )
        if type(seed) is not int:
            raise ConfigError(f"sampled seed is {seed!r}; expected an integer")
        self.bits, self.seed = bits, seed

    def encode(
        self,
        delta: Mapping[str, Tensor],
        fisher: Mapping[str, Tensor] | None = None,
        *,
        max_bytes: int | None = None,
        context: CodecContext | None = None,
    ) -> Encoded:
        """Code as large a sample as fits; `fisher` is not used. Raises BudgetError if `max_bytes` is negative."""
        if max_bytes is not None:
            check_empty_fits(0, max_bytes)
        schema, vector = read_delta(delta)
        source = _Source.of(schema, vector.numpy(), self.seed, context.round if context else 0)
        nothing = Encoded(b"", SparseUpdate(schema.num_params, _no_indices(), torch.zeros(0)))
        if not source.length.any():
            return nothing
        if max_bytes is None:
            return _written(source, max(1, round(self.bits * _TICKETS)))
        return _filled(source, 8 * max_bytes) or nothing

    def decode(self, payload: bytes, schema: Schema, context: CodecContext | None = None) -> SparseUpdate:
        """Sparse update, dense for large samples. Raises MessageError on any malformed payload."""
        if not payload:
            return SparseUpdate(schema.num_params, _no_indices(), torch.zeros(0))
        reader = Reader(payload)
        seed = int.from_bytes(bytes(reader.get(4, uniform(256)).tolist()), "big")
        below = 1 + int(reader.get(1, uniform(_TICKETS))[0])
        full = [i for i, spec in enumerate(schema.tensors) if spec.size]
        symbols = np.zeros(len(schema.tensors), dtype=np.int64)
        symbols[full] = reader.get_adaptive(len(full), Adaptive(_SYMBOLS))
        if not symbols.any():
            raise MessageError("sampled payload sends nothing of any tensor; an empty update is an empty payload")
        places = _places(schema, seed, below, symbols > 0)
        magnitude = _magnitudes(symbols)
        signs, values = reader.finish(tail=places.count), places.room()
        for part in places.parts:
            negative = signs.take(part.last - part.first)
            values[part.first : part.last] = np.where(negative, -magnitude[part.tensor], magnitude[part.tensor])
        return places.update(values)


@dataclass(frozen=True)
class _Source:
    """An update to sample from.

    length: |x|_2^2 / |x|_1 of each tensor, 0 for one of zeros (tensors,). tickets: how many coordinates of the
    tensors that are sent have a ticket below 1, 2, .. 65536.
    """

    schema: Schema
    values: Float32
    seed: int
    length: Float64
    tickets: npt.NDArray[np.int64]

    @classmethod
    def of(cls, schema: Schema, values: Float32, seed: int, round: int) -> _Source:
        text = f"fedfstq sample {seed} {round}\n".encode()
        drawn = int.from_bytes(hashlib.sha256(text + values.tobytes()).digest()[:4], "big")
        length = np.zeros(len(schema.tensors))
        histogram = np.zeros(_TICKETS, dtype=np.int64)
        for i, spec in enumerate(schema.tensors):
            squares = total = 0.0
            for start, end in runs(spec.offset, spec.offset + spec.size):
                part = np.abs(values[start:end].astype(np.float64))
                squares, total = squares + float(part @ part), total + float(part.sum())
            # below the grid's first point a tensor would be sent larger than it is
            if total > 0 and squares / total > grid(_STEPS)[0]:
                length[i] = squares / total
                for start, end in runs(spec.offset, spec.offset + spec.size):
                    histogram += np.bincount(ticket(drawn, start, end), minlength=_TICKETS)
        return cls(schema, values, drawn, length, np.cumsum(histogram))


def ticket(seed: int, start: int, end: int) -> npt.NDArray[np.int64]:
    """A number in 0 .. 65535 for each of the coordinates `start .. end`: the upper half of a 32-bit hash.

    The finaliser of MurmurHash3 of coordinate xor seed: whole numbers only, the same on every machine.
    """
    h = np.arange(start, end, dtype=np.uint32) ^ np.uint32(seed)
    h ^= h >> np.uint32(16)
    h *= np.uint32(0x85EBCA6B)
    h ^= h >> np.uint32(13)
    h *= np.uint32(0xC2B2AE35)
    h ^= h >> np.uint32(16)
    return (h >> np.uint32(16)).astype(np.int64)


def _filled(source: _Source, bits: int) -> Encoded | None:
    """The largest sample whose payload takes at most so many bits; None where not one coordinate fits."""
    spent = 49 + _FIRST_BITS * int((source.length > 0).sum())
    best, fewer = None, _TICKETS + 1
    for _ in range(_TRIES):
        below = min(int(np.searchsorted(source.tickets, bits - spent, side="right")), fewer - 1)
        if below < 1 or source.tickets[below - 1] < 1:
            break
        current = _written(source, below)
        size = 8 * len(current.payload)
        if size <= bits:
            if best is not None and len(best.payload) >= len(current.payload):
                break
            best = current
        else:
            fewer = below
        # what all but the signs take; up to 7 bits of the last byte may be free
        spent = size - int(source.tickets[below - 1])
    return best


def _written(source: _Source, below: int) -> Encoded:
    schema, share = source.schema, below / _TICKETS
    symbols = np.where(source.length > 0, 1 + nearest(source.length / share, _STEPS), 0)
    writer = Writer()
    writer.put(list(source.seed.to_bytes(4, "big")), uniform(256))
    writer.put([below - 1], uniform(_TICKETS))
    writer.put_adaptive([int(symbols[i]) for i, spec in enumerate(schema.tensors) if spec.size], Adaptive(_SYMBOLS))
    places, magnitude = _places(schema, source.seed, below, symbols > 0), _magnitudes(symbols)
    values, negative = places.room(), np.empty(places.count, dtype=np.bool_)
    for part in places.parts:
        minus = source.values[part.start : part.end][places.mask(part)] < 0
        negative[part.first : part.last] = minus
        values[part.first : part.last] = np.where(minus, -magnitude[part.tensor], magnitude[part.tensor])
    return Encoded(writer.finish(tail=negative), places.update(values))


def _places(schema: Schema, seed: int, below: int, sent: npt.NDArray[np.bool_]) -> Places:
    """The sample, of the tensors that are sent (tensors,)."""
    mask = np.zeros(schema.num_params, dtype=np.bool_)
    for spec, takes_part in zip(schema.tensors, sent.tolist(), strict=True):
        if takes_part:
            for start, end in runs(spec.offset, spec.offset + spec.size):
                mask[start:end] = ticket(seed, start, end) < below
    return Places(mask, np.array([spec.offset for spec in schema.tensors] + [schema.num_params]))


def _magnitudes(symbols: npt.NDArray[np.int64]) -> Float32:
    """Of each tensor (tensors,); 0 where nothing is sent."""
    return np.where(symbols > 0, grid(_STEPS)[np.maximum(symbols - 1, 0)], np.float32(0)).astype(np.float32)


def _no_indices() -> Tensor:
    return torch.zeros(0, dtype=torch.int64, device="cpu")
