"""Federated fine-tuning of LoRA adapters with Hugging Face Trainer, in Fisher-guided messages (arXiv 2604.25421)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "FedFSTQConfig",
    "FedFSTQError",
    "FedFSTQMixin",
    "FedFSTQSFTTrainer",
    "FedFSTQTrainer",
    "TokenReducer",
    "TokenReductionLogitsProcessor",
    "__version__",
    "compress_adapter",
    "load_compressed_adapter",
    "push_compressed_adapter",
    "save_compressed_adapter",
]

# Loaded on first use: importing the package must stay cheap, torch and transformers are not.
_LAZY = {
    "FedFSTQConfig": "fedfstq_hf.config",
    "FedFSTQError": "fedfstq_hf.errors",
    "FedFSTQMixin": "fedfstq_hf.trainer.trainer",
    "FedFSTQSFTTrainer": "fedfstq_hf.trainer.sft",
    "FedFSTQTrainer": "fedfstq_hf.trainer.trainer",
    "TokenReducer": "fedfstq_hf.generation.reducer",
    "TokenReductionLogitsProcessor": "fedfstq_hf.generation.logits_processor",
    "compress_adapter": "fedfstq_hf.sharing.compress",
    "load_compressed_adapter": "fedfstq_hf.sharing.hub",
    "push_compressed_adapter": "fedfstq_hf.sharing.hub",
    "save_compressed_adapter": "fedfstq_hf.sharing.hub",
}

if TYPE_CHECKING:
    from fedfstq_hf.config import FedFSTQConfig
    from fedfstq_hf.errors import FedFSTQError
    from fedfstq_hf.generation.logits_processor import TokenReductionLogitsProcessor
    from fedfstq_hf.generation.reducer import TokenReducer
    from fedfstq_hf.sharing.compress import compress_adapter
    from fedfstq_hf.sharing.hub import load_compressed_adapter, push_compressed_adapter, save_compressed_adapter
    from fedfstq_hf.trainer.sft import FedFSTQSFTTrainer
    from fedfstq_hf.trainer.trainer import FedFSTQMixin, FedFSTQTrainer


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
