"""Codecs are plugins: a name, `encode` and `decode`. This module holds the protocol and the table of names.

`@register("name")` adds a codec; the package's own are imported when first asked for.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Protocol, TypeVar

from torch import Tensor

from ..errors import ConfigError
from ..text import unknown
from .schema import Schema
from .update import SparseUpdate

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
    "sparse32": ".sparse32",
    "sparseloco": ".baselines.sparseloco",
    "topk": ".baselines.topk",
    "uniform": ".uniform.codec",
}
_REGISTRY: dict[str, Callable[..., Codec]] = {}
_C = TypeVar("_C", bound="Callable[..., Any]")


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
