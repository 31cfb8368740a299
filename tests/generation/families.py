"""Tiny random causal LMs of the families that token reduction supports, with peaked attention and logits."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB = 64
_TOKENS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
_COMMON: dict[str, Any] = _TOKENS | {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}
_GROUPED = _COMMON | {"num_key_value_heads": 2}
_GEMMA = _GROUPED | {"head_dim": 8}
FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, _GROUPED),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, _GROUPED),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, _GEMMA),
    "mistral": (MistralForCausalLM, MistralConfig, _GROUPED | {"sliding_window": None}),
    "gemma": (GemmaForCausalLM, GemmaConfig, _GEMMA),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, _GEMMA | {"sliding_window": 100, "attn_logit_softcapping": None}),
    "gpt_neox": (GPTNeoXForCausalLM, GPTNeoXConfig, _COMMON),
    "gpt2": (
        GPT2LMHeadModel,
        GPT2Config,
        _TOKENS
        | {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 128, "initializer_range": 0.3},
    ),
}


def make_model(family: str = "llama", **overrides: Any) -> Any:
    kind, config, settings = FAMILIES[family]
    torch.manual_seed(0)
    return kind(config(**settings | overrides)).eval()


def make_ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def left_padded(lengths: list[int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask (B, T) of random prompts of these lengths."""
    longest = max(lengths)
    ids, mask = make_ids(len(lengths), longest, seed), torch.ones(len(lengths), longest, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, : longest - length], mask[row, : longest - length] = 0, 0
    return ids, mask
