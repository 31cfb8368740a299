"""Codec `fstq`: signs of all coordinates by a convolutional code, whose mean over clients is unbiased.

At a tenth of a bit per coordinate one cannot say each sign, but one can say a pattern of signs that points as far in
the update's direction as such a pattern can: the nearest path through a trellis (convolutional.py), which leaves 9 to
15 % more error than the least of any code up to half a bit each (docs/codecs.md). Any budget is one bit for each step,
so all of it is used. What it gets wrong has no direction and differs from message to message: clients
draw apart.

Coded is the update in units of each tensor's size, every sign flipped or not at random. It then looks like noise to any
code of signs, whatever pattern the update has; and what the code gets wrong is different in each message, so that the
mean of many messages is right. A decoded coordinate is plus or minus its tensor's magnitude, which is chosen so that
the whole keeps its length in the direction of what it stands for (the scale of Vargaftik et al. 2021,
https://arxiv.org/abs/2105.08339).

All tensors' signs count alike in the search for the nearest path, or as far as the loss depends on them: with
`fisher_weighted`, a tensor whose coordinates have Fisher information F and mean square s^2 counts (F s^2)^(1/4) times.
The signs of a tensor that counts w times fit about w times as well, which leaves an error of s^2 / w^2 in each of its
coordinates, so that of all weights with the same sum of squares these leave the least sum of F times squared errors.
One weight for a whole tensor keeps the mean of many messages right, and no decoder has to know it.

Payload: one ANS stream (entropy.py), read in this order; an empty update is an empty payload.

| symbols | model | meaning |
|---|---|---|
| 4 | uniform, 256 | seed, the highest byte first |
| 4 | uniform, 256 | steps, the highest byte first |
| non-empty tensors | adaptive, 1025 | 0: nothing of it is sent; else 1 + magnitude, a grid point (8 steps per octave) |
| steps | 1 bit each | the path: the stream's tail |

Of k coordinates in the tensors that are sent, the j-th is sign (j + seed) mod k of the path.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import ConfigError, MessageError
from .budget import check_empty_fits
from .codec import CodecContext, Coordinates, Encoded, SparseUpdate, read_delta, read_fisher, register, runs
from .coding.entropy import Adaptive, Reader, Writer, uniform
from .convolutional import nearest_path, registers, signs
from .schema import Schema

Bool = npt.NDArray[np.bool_]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]
UInt16 = npt.NDArray[np.uint16]
UInt32 = npt.NDArray[np.uint32]
_TRIES = 4
_SLACK = 0.002  # share of a budget that is not worth another try
_LEAST, _MOST = 1 / 4, 4.0  # weights of tensors, so that none is left out by a poor estimate
_STEPS_ADDED = 100  # to each tensor, so that chance makes its scale a tenth too large or small at most, as a rule


@register("fstq")
class FstqCodec:
    """Signs of all coordinates by a convolutional code.

    bits: per parameter, where no `max_bytes` is given, at most 1. seed: with the round and update. fisher_weighted:
    whether tensors count by their Fisher information.
    """

    name = "fstq"
    unbiased = True

    def __init__(self, bits: float = 0.1, seed: int = 0, fisher_weighted: bool = True) -> None:
        if isinstance(bits, bool) or not isinstance(bits, (int, float)) or not 0.0 < bits <= 1.0:
            raise ConfigError(f"fstq bits is {bits!r}; expected bits per parameter above 0 and at most 1, such as 0.1")
        if type(seed) is not int:
            raise ConfigError(f"fstq seed is {seed!r}; expected an integer")
        if not isinstance(fisher_weighted, bool):
            raise ConfigError(f"fstq fisher_weighted is {fisher_weighted!r}; expected true or false")
        self.bits, self.seed, self.fisher_weighted = bits, seed, fisher_weighted

    def encode(
        self,
        delta: Mapping[str, Tensor],
        fisher: Mapping[str, Tensor] | None = None,
        *,
        max_bytes: int | None = None,
        context: CodecContext | None = None,
    ) -> Encoded:
        """Code in as many steps as fit. Raises BudgetError if `max_bytes` is negative.

        `fisher` is used with `fisher_weighted` only.
        """
        if max_bytes is not None:
            check_empty_fits(0, max_bytes)
        schema, vector = read_delta(delta)
        values = vector.numpy()
        size = sizes(schema, values)
        if not size.any():
            return Encoded(b"", nothing(schema))
        seed = draw_seed(values, self.seed, context.round if context else 0)
        places = _places(schema, size > 0)
        weights = read_fisher(schema, fisher) if self.fisher_weighted else None
        emphasis = None if weights is None else _emphasis(schema, size, weights)
        source = _Source(schema, size, seed, places, standard(values, places, size, seed), emphasis)
        if max_bytes is None:
            return source.written(max(1, round(self.bits * schema.num_params)))
        return source.filled(8 * max_bytes) or Encoded(b"", nothing(schema))

    def decode(self, payload: bytes, schema: Schema, context: CodecContext | None = None) -> SparseUpdate:
        """Dense update where a third of the coordinates are sent. Raises MessageError on any malformed payload."""
        if not payload:
            return nothing(schema)
        reader = Reader(payload)
        seed, steps = (int.from_bytes(bytes(reader.get(4, uniform(256)).tolist()), "big") for _ in range(2))
        full = [i for i, spec in enumerate(schema.tensors) if spec.size]
        symbols = np.zeros(len(schema.tensors), dtype=np.int64)
        symbols[full] = reader.get_adaptive(len(full), Adaptive(MAGNITUDES))
        count = sum(schema.tensors[i].size for i in full if symbols[i])
        if not 1 <= steps <= count:
            raise MessageError(f"fstq payload has {steps} steps for {count} coordinates; expected 1 to {max(1, count)}")
        register = registers(reader.finish(tail=steps).take(steps))
        return reconstructed(_places(schema, symbols > 0), seed, symbols, _Rotated(register, seed, count))


@dataclass(frozen=True)
class _Rotated:
    """The signs of coordinates that begin at sign `seed mod count` of a path.

    Steps have two lengths, and those who are in a short one are said better: who that is goes by the seed.
    """

    register: UInt16
    seed: int
    count: int

    def __call__(self, first: int, last: int) -> Bool:
        start = (first + self.seed) % self.count
        end = start + last - first
        if end <= self.count:
            return signs(self.register, start, end)
        return np.concatenate([signs(self.register, start, self.count), signs(self.register, 0, end - self.count)])


@dataclass(frozen=True)
class _Source:
    """An update to code.

    size: root mean square of each tensor, 0 for one that is not sent. sample: (places.count,). emphasis: what each
    tensor's signs count, (tensors,); None for all alike.
    """

    schema: Schema
    size: Float64
    seed: int
    places: Coordinates
    sample: Float32
    emphasis: Float64 | None = None

    def written(self, steps: int) -> Encoded:
        """In so many steps, or one for each coordinate."""
        count = self.places.count
        steps = min(steps, count)
        path = nearest_path(np.roll(self._weighed, self.seed % count), steps)
        minus = _Rotated(registers(path), self.seed, count)
        magnitude = self.size * factors(self.places, self.sample, minus, _STEPS_ADDED / steps, self.emphasis)
        symbols = self._symbols(magnitude)
        payload = self._head(steps, symbols).finish(tail=path)
        return Encoded(payload, reconstructed(self.places, self.seed, symbols, minus))

    def filled(self, bits: int) -> Encoded | None:
        """In as many steps as fit into so many bits; None where not one does."""
        count = self.places.count
        # magnitudes as they would be if no chance were in them
        spent = 8 * len(self._head(1, self._symbols(self.size * (count / max(1, bits)) ** 0.5)).finish()) + 8
        best, fewer = None, count + 1
        for _ in range(_TRIES):
            steps = min(bits - spent, fewer - 1)
            if steps < 1:
                break
            current = self.written(steps)
            size = 8 * len(current.payload)
            if size <= bits:
                best = current
                if bits - size < max(8, _SLACK * bits) or steps == count:
                    break
            else:
                fewer = steps
            spent = size - steps
        return best

    @cached_property
    def _weighed(self) -> Float32:
        """The sample as the search for a path sees it, (places.count,)."""
        if self.emphasis is None:
            return self.sample
        weighed = self.sample.copy()
        for part in self.places.parts:
            weighed[part.first : part.last] *= np.float32(self.emphasis[part.tensor])
        return weighed

    def _symbols(self, magnitude: Float64) -> Int64:
        return np.where(self.size > 0, 1 + nearest_magnitude(magnitude), 0)

    def _head(self, steps: int, symbols: Int64) -> Writer:
        writer = Writer()
        for number in (self.seed, steps):
            writer.put(list(number.to_bytes(4, "big")), uniform(256))
        writer.put_adaptive(
            [int(symbols[i]) for i, spec in enumerate(self.schema.tensors) if spec.size], Adaptive(MAGNITUDES)
        )
        return writer


def _emphasis(schema: Schema, size: Float64, fisher: Tensor) -> Float64 | None:
    """What each tensor's signs count, (tensors,), its mean square over the coordinates that are sent about 1.

    None where no Fisher information is about them.
    """
    count = np.array([spec.size for spec in schema.tensors])
    total = np.array([float(fisher[spec.offset :][: spec.size].double().sum()) for spec in schema.tensors])
    wanted = np.sqrt(np.sqrt(total / np.maximum(count, 1)) * size)
    count *= size > 0
    typical = np.sqrt((count * wanted**2).sum() / count.sum())
    if typical == 0:
        return None
    emphasis: Float64 = np.clip(wanted / typical, _LEAST, _MOST)
    return emphasis


def _places(schema: Schema, sent: Bool) -> Coordinates:
    """All coordinates of the tensors that are sent (tensors,)."""
    mask = np.zeros(schema.num_params, dtype=np.bool_)
    for spec, takes_part in zip(schema.tensors, sent.tolist(), strict=True):
        mask[spec.offset : spec.offset + spec.size] = takes_part
    return Coordinates(mask, np.array([spec.offset for spec in schema.tensors] + [schema.num_params]))


Minus = Callable[[int, int], Bool]
"""Whether the coded signs `first .. last` are minus, in the order of the coordinates that are sent."""

OCTAVES = 128  # the grid of magnitudes spans 2^-80 .. 2^48
_LOWEST = -80
MAGNITUDE_STEPS = 8
"""Grid points per octave of a tensor's magnitude."""
MAGNITUDES = OCTAVES * MAGNITUDE_STEPS + 1
"""Symbols of a magnitude: 0, nothing of the tensor is sent; else 1 + grid point."""


def magnitude_grid() -> Float32:
    """All magnitudes, ascending, float32 (OCTAVES * MAGNITUDE_STEPS,): the same on every machine."""
    return _grid().copy()


@lru_cache(maxsize=1)
def _grid() -> Float32:
    mantissa = [1, 1.0905077, 1.1892071, 1.2968396, 1.4142135, 1.5422108, 1.6817929, 1.8340081]
    octave = np.array(mantissa, dtype=np.float32)
    points: Float32 = np.ldexp(octave, np.arange(_LOWEST, _LOWEST + OCTAVES)[:, None]).reshape(-1)
    return points


def nearest_magnitude(magnitudes: Float64) -> Int64:
    """Index on the grid nearest to each magnitude."""
    points = _grid().astype(np.float64)
    return np.searchsorted((points[1:] + points[:-1]) / 2, magnitudes).astype(np.int64)


def draw_seed(values: Float32, seed: int, round: int) -> int:
    """32 bits from a codec's seed, the round and the update: clients draw apart, and one draws the same again."""
    text = f"fedfstq sample {seed} {round}\n".encode()
    return int.from_bytes(hashlib.sha256(text + values.tobytes()).digest()[:4], "big")


def hashed(seed: int, start: int, end: int) -> UInt32:
    """32 bits for each of the coordinates `start .. end`.

    The finaliser of MurmurHash3 of coordinate xor seed: whole numbers only, the same on every machine.
    """
    h = np.arange(start, end, dtype=np.uint32) ^ np.uint32(seed)
    h ^= h >> np.uint32(16)
    h *= np.uint32(0x85EBCA6B)
    h ^= h >> np.uint32(13)
    h *= np.uint32(0xC2B2AE35)
    h ^= h >> np.uint32(16)
    return h


def flips(h: UInt32) -> Bool:
    """The lowest bit of a hash: whether the coordinate's sign is flipped."""
    return (h & np.uint32(1)).astype(np.bool_)


def sizes(schema: Schema, values: Float32) -> Float64:
    """Root mean square of each tensor, (tensors,); 0 for one that is not sent."""
    size = np.zeros(len(schema.tensors))
    for i, spec in enumerate(schema.tensors):
        squares = 0.0
        for start, end in runs(spec.offset, spec.offset + spec.size):
            part = values[start:end].astype(np.float64)
            squares += float(part @ part)
        # below the grid's first point a tensor would be sent larger than it is
        if spec.size and (squares / spec.size) ** 0.5 > _grid()[0]:
            size[i] = (squares / spec.size) ** 0.5
    return size


def standard(values: Float32, places: Coordinates, size: Float64, seed: int) -> Float32:
    """The coordinates of `places` in units of their tensors' sizes, flipped as the seed has it, (count,)."""
    sample = np.empty(places.count, dtype=np.float32)
    for part in places.parts:
        chosen = places.mask(part)
        scaled = values[part.start : part.end][chosen] / np.float32(size[part.tensor])
        flipped = flips(hashed(seed, part.start, part.end)[chosen])
        sample[part.first : part.last] = np.where(flipped, -scaled, scaled)
    return sample


def factors(
    places: Coordinates, sample: Float32, minus: Minus, added: float, emphasis: Float64 | None = None
) -> Float64:
    """What each tensor's signs have to be multiplied by to be as long as its sample in its direction, (tensors,).

    Where a tensor has few coordinates, chance has a large part in that: of what the whole sample is like, a share
    `added` is counted as the tensor's own.

    emphasis: how well each tensor's signs are expected to fit, relative to others', (tensors,); None for all alike.
    """
    squares, along = np.zeros(len(places.used)), np.zeros(len(places.used))
    for part in places.parts:
        piece = sample[part.first : part.last].astype(np.float64)
        squares[part.tensor] += piece @ piece
        along[part.tensor] += np.where(minus(part.first, part.last), -piece, piece).sum()
    # chance may turn a small tensor's own against it; all signs together never are
    own, whole = np.maximum(along, 0.0), along.sum()
    if whole <= 0:
        return np.zeros_like(own)
    if emphasis is None:
        emphasis = np.ones_like(own)
    expected = whole * emphasis / ((emphasis * squares).sum() / squares.sum())
    found: Float64 = (squares + added * squares.sum()) / (own + added * expected)
    return found


def reconstructed(places: Coordinates, seed: int, symbols: Int64, minus: Minus) -> SparseUpdate:
    """The update that signs stand for: of each coordinate plus or minus its tensor's magnitude.

    symbols: of the tensors' magnitudes (tensors,).
    """
    points = _grid()
    magnitude = np.where(symbols > 0, points[np.maximum(symbols - 1, 0)], np.float32(0)).astype(np.float32)
    values = places.room()
    for part in places.parts:
        down = flips(hashed(seed, part.start, part.end)[places.mask(part)])
        down ^= minus(part.first, part.last)
        values[part.first : part.last] = np.where(down, -magnitude[part.tensor], magnitude[part.tensor])
    return places.update(values)


def nothing(schema: Schema) -> SparseUpdate:
    """The update that an empty payload stands for."""
    return SparseUpdate(schema.num_params, torch.zeros(0, dtype=torch.int64, device="cpu"), torch.zeros(0))
