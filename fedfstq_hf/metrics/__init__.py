"""Local `evaluate` modules: metrics that load and compute without network, and their way into a Trainer.

`load("rouge_l")`, or `evaluate.load(SCRIPT, "rouge_l")`; the numbers come from text_scores.py and sensitive_tokens.py.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .compute import make_compute_metrics, predicted_ids
    from .modules import SCRIPT, load, names

_HOME = {
    "SCRIPT": "modules",
    "load": "modules",
    "make_compute_metrics": "compute",
    "names": "modules",
    "predicted_ids": "compute",
}

__all__ = ["SCRIPT", "load", "make_compute_metrics", "names", "predicted_ids"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
