"""Embedded demo: a tiny Llama base model with its tokenizer, and a writer of clinical-style notes to fine-tune on.

Nothing is downloaded and torch is imported only when the model is loaded. Everything in it is invented.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .clinic import make_examples

if TYPE_CHECKING:
    import torch

__all__ = ["load_model", "load_tokenizer", "make_examples", "model_path"]


def model_path() -> Path:
    """Folder with the base model and its tokenizer, for any `from_pretrained`."""
    return Path(__file__).parent / "model"


def load_model(dtype: "torch.dtype | None" = None) -> Any:
    """The pretrained base as a `LlamaForCausalLM`, in `dtype` (float32 unless given; the file holds float8)."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_path(), dtype=dtype or torch.float32, trust_remote_code=False)


def load_tokenizer() -> Any:
    """The demo's byte-level BPE tokenizer; it adds no special tokens by itself."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_path(), trust_remote_code=False)
