"""Local `evaluate` modules: metrics that load and compute without network, and their way into a Trainer.

`load("rouge_l")`, or `evaluate.load(folder("rouge_l"))`; the numbers come from the pure functions in `cores`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .compute import make_compute_metrics, predicted_ids
    from .modules import folder, load, names

_HOME = {
    "folder": "modules",
    "load": "modules",
    "make_compute_metrics": "compute",
    "names": "modules",
    "predicted_ids": "compute",
}

__all__ = ["folder", "load", "make_compute_metrics", "names", "predicted_ids"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
