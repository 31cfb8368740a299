"""How an update travels: tensors in, bytes out. Knows no transformers, no hub and no federation.

`get_codec(name).encode(delta, fisher, max_bytes=...)`, `message.pack(header, payload)`, and the inverses.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import message
    from .budget import parse_budget
    from .registry import Codec, CodecContext, Encoded, codec_names, get_codec, register
    from .schema import Schema, TensorSpec
    from .update import ErrorFeedback, SparseUpdate

_HOME = {
    "Codec": "registry",
    "CodecContext": "registry",
    "Encoded": "registry",
    "ErrorFeedback": "update",
    "Schema": "schema",
    "SparseUpdate": "update",
    "TensorSpec": "schema",
    "codec_names": "registry",
    "get_codec": "registry",
    "message": "message",
    "parse_budget": "budget",
    "register": "registry",
}

__all__ = [
    "Codec",
    "CodecContext",
    "Encoded",
    "ErrorFeedback",
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
