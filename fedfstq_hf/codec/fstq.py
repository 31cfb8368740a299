"""Codec `fstq`: signs of all coordinates by a convolutional code, whose mean over clients is unbiased.

At a tenth of a bit per coordinate one cannot say each sign, but one can say a pattern of signs that points as far in
the update's direction as such a pattern can: the nearest path through a trellis (convolutional.py), which leaves 9 to
15 % more error than the least of any code up to half a bit each (docs/codecs.md). Any budget is one bit for each step,
so all of it is used. What it gets wrong has no direction and differs from message to message (sign_patterns.py):
clients draw apart.

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

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ..errors import ConfigError, MessageError
from .budget import check_empty_fits
from .coding.coordinates import Coordinates
from .coding.entropy import Adaptive, Reader, Writer, uniform
from .coding.inputs import read_delta, read_fisher
from .convolutional import nearest_path, registers, signs
from .registry import CodecContext, Encoded, register
from .schema import Schema
from .sign_patterns import (
    MAGNITUDES,
    draw_seed,
    factors,
    nearest_magnitude,
    nothing,
    reconstructed,
    sizes,
    standard,
)
from .update import SparseUpdate

Bool = npt.NDArray[np.bool_]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]
UInt16 = npt.NDArray[np.uint16]
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
