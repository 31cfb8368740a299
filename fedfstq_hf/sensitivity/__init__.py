"""What matters: sensitivity of tokens and of adapter coordinates, from gradients that training computes anyway.

Pure torch: knows no transformers, no codec and no federation.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .fisher import AdapterFisher, TokenSensitivity
    from .objective import token_weights, weighted_cross_entropy

_HOME = {
    "AdapterFisher": "fisher",
    "TokenSensitivity": "fisher",
    "token_weights": "objective",
    "weighted_cross_entropy": "objective",
}

__all__ = ["AdapterFisher", "TokenSensitivity", "token_weights", "weighted_cross_entropy"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
