"""What a codec gives and takes: the protocol, the table of names, and updates as sparse or dense vectors.

`@register("name")` adds a codec; the package's own are imported when first asked for. A `Coordinates` says which
coordinates a message carries by one bit for each of the adapter's: index arrays would take twice the adapter in float32
if all are set. Values come in coordinate order into one array, in which they are then moved to where they belong.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import ConfigError, NonFiniteError
from ..text import unknown
from .schema import Schema

_PART = 1 << 17  # coordinates at a time: temporaries stay in the cache
JSONScalar = str | int | float | bool | None

# name -> module that registers it, relative to this package
_BUILTIN = {
    "fedbat": ".baselines.onebit",
    "fedpaq": ".baselines.qsgd",
    "fp16": ".baselines.plain",
    "fp32": ".baselines.plain",
    "fstq": ".fstq",
    "paper": ".baselines.paper",
    "qsgd": ".baselines.qsgd",
    "signsgd": ".baselines.onebit",
    "sparseloco": ".baselines.sparseloco",
    "topk": ".baselines.topk",
    "uniform": ".uniform.quantizer",
}
_REGISTRY: dict[str, Callable[..., Codec]] = {}
_C = TypeVar("_C", bound="Callable[..., Any]")


@dataclass(frozen=True)
class SparseUpdate:
    """`values` at `indices` of a vector of `num_params` coordinates, zero elsewhere.

    indices: int64 (nnz,), strictly increasing, or None if `values` is dense (num_params,). values: float32, CPU.
    """

    num_params: int
    indices: Tensor | None
    values: Tensor

    @property
    def nnz(self) -> int:
        """Number of stored coordinates (all of them if dense)."""
        return self.values.numel()

    def add_to(self, acc: Tensor, weight: float) -> None:
        """acc += weight * update, in place and in acc's own dtype; work is proportional to nnz. acc: (num_params,)."""
        if self.indices is not None:
            acc[self.indices.to(acc.device)] += self.values.to(device=acc.device, dtype=acc.dtype) * weight
            return
        for part, values in zip(torch.split(acc, _PART), torch.split(self.values, _PART), strict=True):
            part += values.to(device=acc.device, dtype=acc.dtype) * weight

    def to_dense(self) -> Tensor:
        """A new float32 vector of shape (num_params,)."""
        if self.indices is None:
            return self.values.clone()
        dense = torch.zeros(self.num_params, dtype=torch.float32, device="cpu")
        dense[self.indices] = self.values
        return dense

    def norm(self) -> float:
        """Euclidean norm, accumulated in float64: finite exactly if every value is.

        The same bits on any processor, for any number of threads.
        """
        return math.sqrt(sum(_sum(part.double().square()) for part in torch.split(self.values, _PART)))


def _sum(terms: Tensor) -> float:
    """The sum of float64 (n,), which is overwritten; halves are added to each other until one number is left.

    A reduction of torch's adds in an order that depends on threads and instruction set.
    """
    while len(terms) > 1:
        half = (len(terms) + 1) // 2
        terms[: len(terms) - half] += terms[half:]
        terms = terms[:half]
    return float(terms[0]) if len(terms) else 0.0


@dataclass(frozen=True)
class CodecContext:
    """What an encoder may know beside the update. round: the one the update belongs to."""

    round: int = 0


@dataclass(frozen=True)
class Encoded:
    """An encoded update: the payload, and exactly what `decode` will make of it.

    params: what the message header has to say for the payload to be decodable. It may depend on the codec's options
    only, never on the data, so that the container's size is known before encoding.
    """

    payload: bytes
    reconstruction: SparseUpdate
    params: dict[str, JSONScalar] = field(default_factory=dict)


class Codec(Protocol):
    """Lossy or lossless coding of one adapter update."""

    name: str
    unbiased: bool
    """Whether what is decoded is right in expectation. It may then be longer than what was encoded, and error feedback
    would diverge; a codec that is not unbiased leaves out less than all, and what it left out is worth carrying on."""

    def encode(
        self,
        delta: Mapping[str, Tensor],
        fisher: Mapping[str, Tensor] | None = None,
        *,
        max_bytes: int | None = None,
        context: CodecContext | None = None,
    ) -> Encoded:
        """Code `delta` into at most `max_bytes` payload bytes (None: the codec's own default).

        `fisher` weighs the squared error per coordinate (None: all equal); it has delta's names and shapes.
        Raises NonFiniteError on NaN or infinity, BudgetError if even an empty update does not fit.
        """
        ...

    def decode(self, payload: bytes, schema: Schema, context: CodecContext | None = None) -> SparseUpdate:
        """Inverse of `encode`; trusts nothing in `payload`. Raises MessageError, and nothing else, if malformed."""
        ...


def register(name: str) -> Callable[[_C], _C]:
    """Class decorator: make `get_codec(name, **options)` construct this class."""

    def add(factory: _C) -> _C:
        if _REGISTRY.get(name, factory) is not factory:
            raise ConfigError(f"codec {name!r} is already registered; choose another name")
        _REGISTRY[name] = factory
        return factory

    return add


def codec_names() -> list[str]:
    """Sorted names that `get_codec` knows."""
    return sorted({*_BUILTIN, *_REGISTRY})


def get_codec(name: str, /, **options: Any) -> Codec:
    """Construct a codec by name. Raises ConfigError, naming the nearest match, for an unknown name or option."""
    if name not in _REGISTRY and name in _BUILTIN:
        import_module(_BUILTIN[name], __package__)
    if name not in _REGISTRY:
        raise ConfigError(unknown("codec", name, codec_names()))
    factory = _REGISTRY[name]
    known = [p for p in inspect.signature(factory).parameters if p != "self"]
    for option in options:
        if option not in known:
            raise ConfigError(unknown("option", option, known, f" of codec {name!r}"))
    return factory(**options)


RUN = 1 << 15  # coordinates worked on at a time
# an index and a value take three times the room of a value
_DENSE = 3


@dataclass(frozen=True)
class Part:
    """Coordinates `start .. end` of one tensor, in which the values `first .. last` lie."""

    tensor: int
    start: int
    end: int
    first: int
    last: int


class Coordinates:
    """Coordinates of a message. mask: bool (num_params,). offsets: first coordinate of each tensor, and the end."""

    def __init__(self, mask: npt.NDArray[np.bool_], offsets: npt.NDArray[np.int64]) -> None:
        self._num_params = mask.size
        self._packed = np.packbits(mask, bitorder="little")
        self.parts: list[Part] = []
        self.used = np.zeros(len(offsets) - 1, dtype=np.bool_)  # tensors that have any
        first = 0
        for tensor, (begin, stop) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
            for start, end in runs(begin, stop):
                last = first + int(np.count_nonzero(mask[start:end]))
                if last > first:
                    self.parts.append(Part(tensor, start, end, first, last))
                    self.used[tensor] = True
                first = last
        self.count = first

    @property
    def dense(self) -> bool:
        """Whether all coordinates take less room than those that are set with their indices."""
        return _DENSE * self.count > self._num_params

    def mask(self, part: Part) -> npt.NDArray[np.bool_]:
        """Which coordinates of a part are set, (end - start,)."""
        bits = np.unpackbits(self._packed[part.start // 8 : -(-part.end // 8)], bitorder="little")
        return bits[part.start % 8 :][: part.end - part.start].view(np.bool_)

    def room(self) -> npt.NDArray[np.float32]:
        """An array for values, the first `count` of it in coordinate order; with more room if the update is dense."""
        return np.zeros(self._num_params if self.dense else self.count, dtype=np.float32)

    def indices(self) -> npt.NDArray[np.int64]:
        """Ascending coordinates (count,)."""
        indices = np.empty(self.count, dtype=np.int64)
        for part in self.parts:
            indices[part.first : part.last] = np.flatnonzero(self.mask(part)) + part.start
        return indices

    def update(self, values: npt.NDArray[np.float32]) -> SparseUpdate:
        """The update whose values stand in an array that `room` made, which is used up."""
        if not self.dense:
            return SparseUpdate(self._num_params, torch.from_numpy(self.indices()), torch.from_numpy(values))
        end = self._num_params
        # backwards: values only move up, so that none is overwritten before it is read
        for part in reversed(self.parts):
            moved = values[part.first : part.last].copy()
            values[part.start : end] = 0
            values[part.start : part.end][self.mask(part)] = moved
            end = part.start
        values[:end] = 0
        return SparseUpdate(self._num_params, None, torch.from_numpy(values))


def runs(start: int, end: int) -> Iterator[tuple[int, int]]:
    """`start .. end` in pieces."""
    for begin in range(start, end, RUN):
        yield begin, min(begin + RUN, end)


def read_delta(delta: Mapping[str, Tensor]) -> tuple[Schema, Tensor]:
    """Schema and flat CPU float32 vector of a delta. Raises NonFiniteError naming the first bad tensor."""
    schema = Schema.from_state_dict(delta)
    vector = schema.flatten(delta)
    _check_finite(schema, vector, "update")
    return schema, vector


def read_fisher(schema: Schema, fisher: Mapping[str, Tensor] | None) -> Tensor | None:
    """Flat CPU float32 Fisher, or None. Raises NonFiniteError on NaN or infinity, ConfigError on negative entries."""
    if fisher is None:
        return None
    vector = schema.flatten(fisher)
    _check_finite(schema, vector, "Fisher information")
    if vector.numel() and float(vector.min()) < 0:
        raise ConfigError("Fisher information has negative entries; expected means of squared gradients")
    return vector


def largest_magnitude(schema: Schema, state: Mapping[str, Tensor], what: str, *, signed: bool = True) -> float:
    """Largest |entry| of a state dict, without copying it.

    Raises AdapterMismatchError unless names and shapes are the schema's, NonFiniteError on NaN or infinity, and
    ConfigError on entries below 0 that are not `signed`.
    """
    schema.check(state)
    lows, highs = [], []
    for spec in schema.tensors:
        if spec.size:
            low, high = torch.aminmax(state[spec.name].detach())
            lows.append(low.float().cpu())
            highs.append(high.float().cpu())
    if not lows:
        return 0.0
    low, high = torch.stack(lows).min(), torch.stack(highs).max()
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        _check_finite(schema, schema.flatten(state), what)
    if not signed and float(low) < 0:
        raise ConfigError(f"{what} has negative entries; expected means of squared gradients")
    return max(abs(float(low)), abs(float(high)))


def _check_finite(schema: Schema, vector: Tensor, what: str) -> None:
    # one reduction on the good path: a sum of zeros is NaN exactly if an entry was NaN or infinite
    if torch.isfinite((vector * 0).sum()):
        return
    for spec in schema.tensors:
        part = vector[spec.offset : spec.offset + spec.size]
        if not bool(torch.isfinite(part).all()):
            raise NonFiniteError(
                f"{what} of tensor {spec.name!r} holds NaN or infinity in {int((~torch.isfinite(part)).sum())} of "
                f"{spec.size} entries; nothing was encoded. Lower the learning rate or skip the step"
            )
