"""Attention of one decoder block, as the block itself computes it, without running the rest of it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from fedfstq_hf.errors import ConfigError
from fedfstq_hf.generation.blocks import BlockInput

_CAPTURE = "fedfstq_capture"
_NO_CACHE = {"past_key_values": None, "past_key_value": None, "layer_past": None, "use_cache": False}


class _Captured(Exception):
    """Ends a block's forward pass where its attention begins, with what that was given."""

    def __init__(self, query: Tensor, key: Tensor, mask: Any, options: dict[str, Any]) -> None:
        super().__init__()
        self.query, self.key, self.mask, self.options = query, key, mask, options


def _capture(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, *rest: Any, **options: Any
) -> Any:
    if rest:
        options.setdefault("scaling", rest[0])
    raise _Captured(query, key, attention_mask, options)


AttentionInterface.register(_CAPTURE, _capture)


def window_attention(inputs: BlockInput, window: int) -> Tensor:
    """Attention probabilities of the last `window` tokens over the prompt: (B, query heads, window, T) float32.

    Queries and keys are those that the block hands to its attention function, normalised and rotated as it does.
    Causal within the window; padding gets 0. Cost: the projections of one block, and `window` instead of T rows of
    scores.

    Raises:
        ConfigError: the block's attention is no function that transformers lets be exchanged, or has terms of its own.
    """
    found = _captured(inputs)
    query, key = found.query[:, :, -window:], found.key
    batch, heads, window, size = query.shape
    length = key.shape[2]
    scale = found.options.get("scaling")
    grouped = query.reshape(batch, key.shape[1], heads // key.shape[1], window, size)
    logits = (grouped @ key.transpose(-1, -2).unsqueeze(2)).float() * (size**-0.5 if scale is None else scale)
    logits = logits.view(batch, heads, window, length)
    if (cap := found.options.get("softcap")) is not None:
        logits = torch.tanh(logits / cap) * cap
    places = torch.arange(length, device=logits.device)
    allowed = (places <= places[length - window :, None]) & inputs.attention_mask.bool()[:, None, :]  # (B, window, T)
    allowed = allowed[:, None]
    if isinstance(found.mask, Tensor) and found.mask.ndim == 4 and found.mask.shape[-1] == length:
        given = found.mask[:, :, -window:]
        allowed, logits = (allowed & given, logits) if given.dtype == torch.bool else (allowed, logits + given.float())
    logits = logits.masked_fill(~allowed, torch.finfo(torch.float32).min)
    if (sinks := found.options.get("s_aux")) is not None:  # one more column, which takes its share and is dropped
        logits = torch.cat([logits, sinks.float().view(1, heads, 1, 1).expand(batch, heads, window, 1)], dim=-1)
    probabilities: Tensor = logits.softmax(-1)[..., :length]
    return probabilities


# What an attention function may be given beside scores of queries and keys, and this one does not know
_TERMS = {"position_bias", "attention_bias", "alibi", "head_mask", "indexer", "indices"}


def _captured(inputs: BlockInput) -> _Captured:
    """What the block's attention is given; the block itself, which other threads may run, is left alone."""
    block = copy.copy(inputs.block)
    block.__dict__.pop("forward", None)  # Accelerate's wrapper around a module's forward is bound to the original
    block._modules = dict(block._modules)
    for name, child in block._modules.items():
        if child is None or not hasattr(child, "config"):
            continue
        own: Any = copy.copy(child)
        own.__dict__.pop("forward", None)
        own.config = copy.copy(own.config)
        own.config._attn_implementation_internal = _CAPTURE
        block._modules[name] = own
    given = {name: value for name, value in inputs.given.items() if value is not None or name == "attention_mask"}
    given |= {name: value for name, value in _NO_CACHE.items() if name in given}
    try:
        with torch.no_grad():
            block.forward(**given)
    except _Captured as found:
        if terms := sorted(name for name in _TERMS if found.options.get(name) is not None):
            raise _unknown(inputs.block, f"adds {', '.join(terms)}") from None
        return found
    except Exception as error:  # of whatever kind: the block is somebody else's
        raise _unknown(inputs.block, f"cannot be run by itself ({type(error).__name__}: {error})") from error
    raise _unknown(inputs.block, "is no function that transformers lets be exchanged")


def content_keys(inputs: BlockInput) -> Tensor:
    """The attention's keys before their rotation to positions, (B, key heads, T, D)."""
    attention, norm = _parts(inputs.block)
    return _keys(attention, norm(inputs.hidden))


def _parts(block: Any) -> tuple[Any, Any]:
    """A block's attention and the norm before it, under the names of the Llama, GPT-NeoX and GPT-2 families."""
    for attention, norm in (("self_attn", "input_layernorm"), ("attention", "input_layernorm"), ("attn", "ln_1")):
        found = getattr(block, attention, None), getattr(block, norm, None)
        if None not in found:
            return found
    raise _unknown(block)


def _keys(attention: Any, hidden: Tensor) -> Tensor:
    size = getattr(attention, "head_dim", None) or getattr(attention, "head_size", None)
    if size is None:
        raise _unknown(attention)
    if (projection := getattr(attention, "query_key_value", None)) is not None:  # GPT-NeoX: per head q, k, v
        return _heads(projection(hidden), 3 * size)[..., size : 2 * size]
    if (projection := getattr(attention, "c_attn", None)) is not None:  # GPT-2: all q, all k, all v
        return _heads(projection(hidden).split(attention.split_size, dim=2)[1], size)
    if getattr(attention, "k_proj", None) is None:
        raise _unknown(attention)
    keys = _heads(attention.k_proj(hidden), size)
    if getattr(attention, "k_norm", None) is not None:  # Qwen 3, Gemma 3
        keys = attention.k_norm(keys)
    return keys


def _heads(states: Tensor, size: int) -> Tensor:
    return states.view(*states.shape[:2], -1, size).transpose(1, 2)


def _unknown(module: Any, why: str = "has other projections") -> ConfigError:
    return ConfigError(
        f"query-aware scoring does not know the attention of {type(module).__name__}: it {why}; use a scorer without "
        "it, for example TokenReducer(scorer=Rarity()) or one with a token table"
    )
