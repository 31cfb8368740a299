"""How an update travels: tensors in, bytes out. Knows no transformers, no hub and no federation.

`get_codec(name).encode(delta, fisher, max_bytes=...)`, `message.pack(header, payload)`, and the inverses.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import message
    from .budget import parse_budget
    from .codec import Codec, CodecContext, Encoded, SparseUpdate, codec_names, get_codec, register
    from .schema import Schema, TensorSpec

_HOME = {
    "Codec": "codec",
    "CodecContext": "codec",
    "Encoded": "codec",
    "Schema": "schema",
    "SparseUpdate": "codec",
    "TensorSpec": "schema",
    "codec_names": "codec",
    "get_codec": "codec",
    "message": "message",
    "parse_budget": "budget",
    "register": "codec",
}

__all__ = [
    "Codec",
    "CodecContext",
    "Encoded",
    "Schema",
    "SparseUpdate",
    "TensorSpec",
    "codec_names",
    "get_codec",
    "message",
    "parse_budget",
    "register",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f".{_HOME[name]}", __name__)
    return module if name == _HOME[name] else getattr(module, name)


def __dir__() -> list[str]:
    return __all__
