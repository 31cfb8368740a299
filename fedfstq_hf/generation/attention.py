"""Queries and keys of one decoder block, computed from its own projections without running its attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedfstq_hf.errors import ConfigError
from fedfstq_hf.generation.blocks import BlockInput


def window_attention(inputs: BlockInput, window: int) -> Tensor:
    """Attention probabilities of the last `window` tokens over the prompt: (B, query heads, window, T) float32.

    Causal within the window; padding gets 0. Cost: one key projection, and `window` instead of T rows of scores.
    """
    attention, norm = _parts(inputs.block)
    hidden = norm(inputs.hidden)
    length = hidden.shape[1]
    window = min(window, length)
    query, key = _query_and_key(attention, hidden, window)
    if inputs.rotary is not None:
        cos, sin = inputs.rotary
        key = rotate(key, cos, sin)
        query = rotate(query, cos[:, -window:], sin[:, -window:])
    batch, heads, _, size = query.shape
    grouped = query.view(batch, key.shape[1], heads // key.shape[1], window, size)
    scale = getattr(attention, "scaling", None) or size**-0.5
    logits = (grouped @ key.transpose(-1, -2).unsqueeze(2)).float() * scale  # (B, key heads, group, window, T)
    places = torch.arange(length, device=hidden.device)
    allowed = (places <= places[length - window :, None]) & inputs.attention_mask.bool()[:, None, :]  # (B, window, T)
    logits = logits.masked_fill(~allowed[:, None, None], torch.finfo(torch.float32).min)
    probabilities: Tensor = logits.softmax(-1).view(batch, heads, window, length)
    return probabilities


def content_keys(inputs: BlockInput) -> Tensor:
    """The attention's keys before their rotation to positions, (B, key heads, T, D)."""
    attention, norm = _parts(inputs.block)
    return _query_and_key(attention, norm(inputs.hidden), 1)[1]


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (RoFormer, arXiv 2104.09864) on (B, heads, T, D); further dimensions than cos has stay."""
    size = cos.shape[-1]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turned, rest = states[..., :size], states[..., size:]
    half = size // 2
    swapped = torch.cat([-turned[..., half:], turned[..., :half]], dim=-1)
    return torch.cat([turned * cos + swapped * sin, rest], dim=-1)


def _parts(block: Any) -> tuple[Any, Any]:
    """A block's attention and the norm before it, under the names of the Llama, GPT-NeoX and GPT-2 families."""
    for attention, norm in (("self_attn", "input_layernorm"), ("attention", "input_layernorm"), ("attn", "ln_1")):
        found = getattr(block, attention, None), getattr(block, norm, None)
        if None not in found:
            return found
    raise _unknown(block)


def _query_and_key(attention: Any, hidden: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Before rotation: queries of the last tokens (B, heads, window, D) and all keys (B, key heads, T, D)."""
    size = getattr(attention, "head_dim", None) or getattr(attention, "head_size", None)
    if size is None:
        raise _unknown(attention)
    tail = hidden[:, -window:]
    if (projection := getattr(attention, "query_key_value", None)) is not None:  # GPT-NeoX: per head q, k, v
        mixed = _heads(projection(hidden), 3 * size)
        return mixed[:, :, -window:, :size], mixed[..., size : 2 * size]
    if (projection := getattr(attention, "c_attn", None)) is not None:  # GPT-2: all q, all k, all v
        query, key, _ = projection(hidden).split(attention.split_size, dim=2)
        return _heads(query[:, -window:], size), _heads(key, size)
    if getattr(attention, "q_proj", None) is None or getattr(attention, "k_proj", None) is None:
        raise _unknown(attention)
    query, key = _heads(attention.q_proj(tail), size), _heads(attention.k_proj(hidden), size)
    if getattr(attention, "q_norm", None) is not None:  # Qwen 3, Gemma 3
        query, key = attention.q_norm(query), attention.k_norm(key)
    return query, key


def _heads(states: Tensor, size: int) -> Tensor:
    return states.view(*states.shape[:2], -1, size).transpose(1, 2)


def _unknown(module: Any) -> ConfigError:
    return ConfigError(
        f"query-aware scoring does not know the attention of {type(module).__name__}; use a scorer without it, "
        "for example TokenReducer(scorer=Rarity()) or one with a token table"
    )
