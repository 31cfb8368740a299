"""Token-reduced `generate()`: prompts shortened by saliency, before or early in the prefill."""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "QueryAttention": "scorers",
    "Saliency": "saliency",
    "Scorer": "scorers",
    "TokenReducer": "reducer",
    "TokenReductionLogitsProcessor": "logits_processor",
}

__all__ = ["QueryAttention", "Saliency", "Scorer", "TokenReducer", "TokenReductionLogitsProcessor"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
