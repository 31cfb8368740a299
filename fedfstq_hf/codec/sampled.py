"""Codec `sampled`: signs of a random sample of coordinates, as codewords whose mean over clients is unbiased.

What a client sends of a coordinate that is not in its sample is nothing; which ones are follows from a seed in the
message, so they cost no index. The clients of a round draw apart: in their mean every coordinate has a say, and what
one message misses is noise without direction, which training tolerates far better than a part that is never sent.
(Random masks: Konecny et al. 2016, https://arxiv.org/abs/1610.05492, section 2; the scale, with which a rounded vector
keeps the length of what it stands for: Vargaftik et al. 2021, https://arxiv.org/abs/2105.08339.)

A bit for a sign is dear where there are few: 1 + m bits name the codeword nearest to 2^m coordinates (codewords.py),
which leaves 0.6 to 0.7 of the error that the signs of 1 + m of them leave. Blocks are spread over the whole adapter, in
units of each tensor's size and with random flips, so that an update looks like noise to them; a coordinate that
outweighs its block comes out smaller.

Payload: one ANS stream (entropy.py), read in this order; an empty update is an empty payload.

| symbols | model | meaning |
|---|---|---|
| 4 | uniform, 256 | seed, the highest byte first |
| 1 | uniform, 65536 | T - 1: coordinate i is in the sample if `ticket(seed, i)` < T |
| 1 | uniform, 11 | m: blocks are of d = 2^m coordinates |
| non-empty tensors | adaptive, 1025 | 0: nothing of it is sent; else 1 + magnitude, a grid point (8 steps per octave) |
| blocks | 1 bit each | sign of the codeword (1 = negative): the stream's tail, as is what follows |
| m times the blocks | 1 bit each | number of the codeword: the lowest bit of each block's, then the next |

Of k coordinates in the sample, ceil(k / d) = b blocks are made: the j-th is at place j // b of block j % b.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ..errors import ConfigError, MessageError
from .budget import check_empty_fits
from .codewords import LARGEST, Bool, Float32, best_exponent, nearest_codewords, signs
from .dense import read_delta
from .entropy import Adaptive, Reader, Writer, uniform
from .flips import (
    MAGNITUDE_STEPS,
    MAGNITUDES,
    check_bits_and_seed,
    draw_seed,
    factors,
    hashed,
    nothing,
    reconstructed,
    sizes,
    standard,
)
from .places import Places, runs
from .quantization import nearest
from .registry import CodecContext, Encoded, register
from .schema import Schema
from .update import SparseUpdate

Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]
_TICKETS = 1 << 16
_OVERHEAD = 52  # bits of seed, T, m and the tail's end
_FIRST_BITS = 8  # of one magnitude, before it is known
_TRIES = 6
_SLACK = 0.002  # share of a budget that is not worth another try
_BLOCKS_ADDED = 16  # to each tensor, so that chance makes its scale a tenth too large or small at most, as a rule


@register("sampled")
class SampledCodec:
    """Codewords of signs of a random sample.

    bits: per parameter, where no `max_bytes` is given. block: coordinates of a codeword, a power of two up to 1024;
    by default what leaves the least error at the budget. seed: with the round and update.
    """

    name = "sampled"

    def __init__(self, bits: float = 0.1, block: int | None = None, seed: int = 0) -> None:
        if block is not None and (type(block) is not int or block not in (1 << m for m in range(len(LARGEST)))):
            raise ConfigError(
                f"sampled block is {block!r}; expected a power of two from 1 to {1 << (len(LARGEST) - 1)}, such as 64"
            )
        check_bits_and_seed("sampled", bits, seed)
        self.bits, self.block, self.seed = bits, block, seed

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
        if not source.size.any():
            return Encoded(b"", nothing(schema))
        spent = _OVERHEAD + _FIRST_BITS * int((source.size > 0).sum())
        room = round(self.bits * schema.num_params) if max_bytes is None else 8 * max_bytes - spent
        exponent = best_exponent(room, int(source.tickets[-1])) if self.block is None else self.block.bit_length() - 1
        if max_bytes is None:
            return _written(source, max(1, source.below(room, exponent)), exponent)
        return _filled(source, 8 * max_bytes, spent, exponent) or Encoded(b"", nothing(schema))

    def decode(self, payload: bytes, schema: Schema, context: CodecContext | None = None) -> SparseUpdate:
        """Sparse update, dense for large samples. Raises MessageError on any malformed payload."""
        if not payload:
            return nothing(schema)
        reader = Reader(payload)
        seed = int.from_bytes(bytes(reader.get(4, uniform(256)).tolist()), "big")
        below = 1 + int(reader.get(1, uniform(_TICKETS))[0])
        exponent = int(reader.get(1, uniform(len(LARGEST)))[0])
        full = [i for i, spec in enumerate(schema.tensors) if spec.size]
        symbols = np.zeros(len(schema.tensors), dtype=np.int64)
        symbols[full] = reader.get_adaptive(len(full), Adaptive(MAGNITUDES))
        if not symbols.any():
            raise MessageError("sampled payload sends nothing of any tensor; an empty update is an empty payload")
        places = _places(schema, seed, below, symbols > 0)
        blocks = -(-places.count >> exponent)
        bits = reader.finish(tail=blocks * (1 + exponent))
        negative, number = bits.take(blocks), np.zeros(blocks, dtype=np.uint16)
        for plane in range(exponent):
            number |= bits.take(blocks).astype(np.uint16) << np.uint16(plane)
        return reconstructed(places, seed, symbols, partial(signs, negative, number))


@dataclass(frozen=True)
class _Source:
    """An update to sample from.

    size: root mean square of each tensor, 0 for one that is not sent (tensors,). tickets: how many coordinates of the
    tensors that are sent have a ticket below 1, 2, .. 65536.
    """

    schema: Schema
    values: Float32
    seed: int
    size: Float64
    tickets: Int64

    @classmethod
    def of(cls, schema: Schema, values: Float32, seed: int, round: int) -> _Source:
        drawn, size = draw_seed(values, seed, round), sizes(schema, values)
        histogram = np.zeros(_TICKETS, dtype=np.int64)
        for i in np.flatnonzero(size).tolist():
            spec = schema.tensors[i]
            for start, end in runs(spec.offset, spec.offset + spec.size):
                histogram += np.bincount(ticket(hashed(drawn, start, end)), minlength=_TICKETS)
        return cls(schema, values, drawn, size, np.cumsum(histogram))

    def below(self, bits: int, exponent: int) -> int:
        """The largest T whose codewords take at most so many bits; 0 where none does."""
        coordinates = max(0, bits) // (1 + exponent) << exponent
        return int(np.searchsorted(self.tickets, coordinates, side="right"))


def ticket(h: npt.NDArray[np.uint32]) -> Int64:
    """The upper half of a hash: a number in 0 .. 65535."""
    return (h >> np.uint32(16)).astype(np.int64)


def _filled(source: _Source, bits: int, spent: int, exponent: int) -> Encoded | None:
    """The largest sample whose payload takes at most so many bits; None where not one coordinate fits.

    spent: guess of the bits that all but the codewords take.
    """
    best, fewer, written = None, _TICKETS + 1, 0
    for _ in range(_TRIES):
        below = min(source.below(bits - spent, exponent), fewer - 1)
        if below < 1 or source.tickets[below - 1] <= (written if best else 0):
            break
        current, written = _written(source, below, exponent), int(source.tickets[below - 1])
        size = 8 * len(current.payload)
        if size <= bits:
            best = current
            if bits - size < _SLACK * bits:
                break
        else:
            fewer = below
        # what all but the codewords take; up to 7 bits of the last byte may be free
        spent = size - -(-written >> exponent) * (1 + exponent)
    return best


def _written(source: _Source, below: int, exponent: int) -> Encoded:
    places = _places(source.schema, source.seed, below, source.size > 0)
    sample = standard(source.values, places, source.size, source.seed)
    negative, number = nearest_codewords(sample, exponent)
    minus = partial(signs, negative, number)
    added = _BLOCKS_ADDED / max(1, len(negative))  # as a share of the sample
    magnitude = source.size * factors(places, sample, minus, added) / (below / _TICKETS)
    symbols = np.where(source.size > 0, 1 + nearest(magnitude, MAGNITUDE_STEPS), 0)
    writer = Writer()
    writer.put(list(source.seed.to_bytes(4, "big")), uniform(256))
    writer.put([below - 1], uniform(_TICKETS))
    writer.put([exponent], uniform(len(LARGEST)))
    writer.put_adaptive(
        [int(symbols[i]) for i, spec in enumerate(source.schema.tensors) if spec.size], Adaptive(MAGNITUDES)
    )
    planes = [number >> np.uint16(plane) & np.uint16(1) for plane in range(exponent)]
    tail = np.concatenate([negative, *(plane.astype(np.bool_) for plane in planes)])
    return Encoded(writer.finish(tail=tail), reconstructed(places, source.seed, symbols, minus))


def _places(schema: Schema, seed: int, below: int, sent: Bool) -> Places:
    """The sample, of the tensors that are sent (tensors,)."""
    mask = np.zeros(schema.num_params, dtype=np.bool_)
    for spec, takes_part in zip(schema.tensors, sent.tolist(), strict=True):
        if takes_part:
            for start, end in runs(spec.offset, spec.offset + spec.size):
                mask[start:end] = ticket(hashed(seed, start, end)) < below
    return Places(mask, np.array([spec.offset for spec in schema.tensors] + [schema.num_params]))
