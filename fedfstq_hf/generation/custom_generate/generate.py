"""Token-reduced `generate()` for an adapter's repo; needs transformers (5.20 or newer) and torch, nothing else.

    model.generate(**inputs, custom_generate="ORG/REPO", revision="COMMIT", trust_remote_code=True, keep_ratio=0.5)

It is code, and runs with your rights. Whoever can write to ORG/REPO can change it at any time, so name the full sha of
a commit whose file you have read.

The first `layer` blocks see the whole prompt; then the tokens that the prompt's last `window` tokens attend to least
are dropped, and the other blocks and the cache hold the rest, at their original positions. The result is the whole
prompt and the new tokens. Decoders with blocks in `layers` whose attention transformers lets be exchanged; greedy
search, sampling, beams, streamers, left-padded batches. A cache cannot be passed in or kept.
"""

from __future__ import annotations

import copy
import inspect
import math
import threading
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

_LOOPS = {"greedy_search": "_sample", "sample": "_sample", "beam_search": "_beam_search", "beam_sample": "_beam_search"}


def generate(
    model: Any,
    keep_ratio: float = 0.5,
    layer: int = 2,
    window: int = 8,
    reach: int = 2,
    first: int = 4,
    min_tokens: int = 128,
    revision: str | None = None,
    **arguments: Any,
) -> Any:
    """As `model.generate(**arguments)` on a shortened prompt.

    keep_ratio: share of the tokens to keep, in (0, 1]. window: last tokens, which ask and are always kept. reach: how
    many neighbours share a token's score. first: tokens always kept at the start. min_tokens: shorter prompts pass
    through unchanged. revision: commit that this file was read from; transformers asked for it. Raises ValueError for
    what it cannot do.
    """
    if not 0 < keep_ratio <= 1:
        raise ValueError(f"keep_ratio is {keep_ratio}; expected a share in (0, 1], for example 0.5")
    if arguments.get("past_key_values") is not None or arguments.get("assistant_model") is not None:
        raise ValueError("token reduction here takes neither past_key_values nor assistant_model; leave them out")
    if arguments.get("inputs_embeds") is not None or model.config.is_encoder_decoder:
        raise ValueError("token reduction needs input_ids and a decoder-only model")
    options: dict[str, Any] = {"ratio": keep_ratio, "layer": layer, "window": window, "reach": reach, "first": first}
    options["least"] = min_tokens
    tokenizer = arguments.get("tokenizer")
    special = set(tokenizer.all_special_ids) if tokenizer is not None else _special_ids(model.generation_config)

    def loop(
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **kwargs: Any,
    ) -> Any:
        name = _LOOPS.get(mode := generation_config.get_generation_mode().value)
        if name is None:
            raise ValueError(f"token reduction knows {sorted(_LOOPS)}, not {mode!r}")
        mask = kwargs.get("attention_mask")
        mask = torch.ones_like(input_ids) if mask is None else mask.long()
        if int(mask.sum(-1).max()) >= min_tokens and keep_ratio < 1:
            _check(model, generation_config, mask)
            options["special"] = torch.isin(input_ids, torch.tensor(sorted(special), device=input_ids.device))
            model = _Reduced(model, mask, options)
        if arguments.get("streamer") is not None and name == "_sample":
            kwargs["streamer"] = arguments["streamer"]
        kind = type(model.model) if isinstance(model, _Reduced) else type(model)
        result = getattr(kind, name)(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs)
        if isinstance(model, _Reduced) and getattr(result, "past_key_values", None) is not None:
            result.past_key_values = None  # it lacks tokens, and nothing would tell its next user
        return result

    return model.generate(custom_generate=loop, **arguments)


class _Reduced:
    """A model whose prefill drops tokens; everything else is the model's own."""

    def __init__(self, model: Any, mask: Tensor, options: dict[str, Any]) -> None:
        self.model, self.mask, self.options = model, mask, options

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def _prefill(self, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], **kwargs: Any) -> Any:
        start, length = self.options["layer"], input_ids.shape[1]
        chosen: list[Tensor] = []

        def cut(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(cut(item) for item in value)
            if not isinstance(value, Tensor) or chosen[0].shape[1] == length:
                return value
            if value.ndim == 4 and value.shape[-2:] == (length, length):
                return _take(_take(value, chosen[0], 2), chosen[0], 3)
            return _take(value, chosen[0], 1) if value.ndim in (2, 3) and value.shape[1] == length else value

        owner = threading.get_ident()

        def before(block: Any, args: tuple[Any, ...], given: dict[str, Any] | None = None) -> Any:
            if threading.get_ident() != owner or given is None:  # another thread runs the same model
                return None
            if not chosen:
                named = dict(zip(inspect.signature(block.forward).parameters, args, strict=False)) | given
                chosen.append(_choose(_scores(block, named, self.mask, self.options), self.mask, self.options))
            return tuple(cut(value) for value in args), {name: cut(value) for name, value in given.items()}

        blocks = self.model.get_decoder().layers
        handles = [block.register_forward_pre_hook(before, with_kwargs=True) for block in blocks[start:]]
        try:
            outputs = self.model._prefill(input_ids, generation_config, model_kwargs, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        for early in outputs.past_key_values.layers[:start]:
            early.keys, early.values = _take(early.keys, chosen[0], 2), _take(early.values, chosen[0], 2)
        mask = self.mask.gather(1, chosen[0])
        model_kwargs["attention_mask"] = mask if bool((mask == 0).any()) else None
        return outputs


class _Captured(Exception):
    """Ends a block's forward pass where its attention begins."""


def _capture(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **options: Any) -> Any:
    raise _Captured(query, key, attention_mask, options)


_NAME = f"fedfstq_capture_{id(_Captured)}"  # this file may be loaded more than once
AttentionInterface.register(_NAME, _capture)


def _scores(block: Any, given: dict[str, Any], mask: Tensor, options: dict[str, Any]) -> Tensor:
    """(B, T) attention of the last window: mean over the window, maximum over heads, shared among neighbours.

    Queries and keys are those that the block hands to its own attention function.
    """
    block = copy.copy(block)
    block.__dict__.pop("forward", None)  # Accelerate's wrapper around a module's forward is bound to the original
    block._modules = dict(block._modules)
    for name, child in block._modules.items():
        if child is not None and hasattr(child, "config"):
            child = copy.copy(child)
            child.__dict__.pop("forward", None)
            child.config = copy.copy(child.config)
            child.config._attn_implementation_internal = _NAME
            block._modules[name] = child
    try:
        block.forward(**given | {name: None for name in ("past_key_values", "past_key_value") if name in given})
    except _Captured as found:
        query, key, own_mask, terms = found.args
    else:
        raise ValueError(f"token reduction here does not know the attention of {type(block).__name__}")
    if any(terms.get(name) is not None for name in ("position_bias", "attention_bias", "alibi", "head_mask")):
        raise ValueError(f"the attention of {type(block).__name__} has terms that token reduction here does not know")
    query = query[:, :, -options["window"] :]
    batch, heads, window, size = query.shape
    length, scale = key.shape[2], terms.get("scaling")
    grouped = query.reshape(batch, key.shape[1], -1, window, size)
    logits = (grouped @ key.transpose(-1, -2).unsqueeze(2)).float() * (size**-0.5 if scale is None else scale)
    logits = logits.view(batch, heads, window, length)
    if (cap := terms.get("softcap")) is not None:
        logits = torch.tanh(logits / cap) * cap
    places = torch.arange(length, device=logits.device)
    allowed = ((places <= places[length - window :, None]) & mask.bool()[:, None, :])[:, None]
    if isinstance(own_mask, Tensor) and own_mask.ndim == 4 and own_mask.shape[-1] == length:
        seen = own_mask[:, :, -window:]
        allowed, logits = (allowed & seen, logits) if seen.dtype == torch.bool else (allowed, logits + seen.float())
    logits = logits.masked_fill(~allowed, torch.finfo(torch.float32).min)
    if (sinks := terms.get("s_aux")) is not None:
        logits = torch.cat([logits, sinks.float().view(1, heads, 1, 1).expand(batch, heads, window, 1)], dim=-1)
    peak = logits.softmax(-1)[..., :length].mean(2).amax(1)
    return F.max_pool1d(peak[:, None], 2 * options["reach"] + 1, stride=1, padding=options["reach"])[:, 0]


def _choose(scores: Tensor, mask: Tensor, options: dict[str, Any]) -> Tensor:
    """(B, K) kept positions, ascending; rows that keep fewer than K are filled up with padding."""
    real = mask.bool()
    ends = (real.cumsum(-1) <= options["first"]) | (real.flip(-1).cumsum(-1).flip(-1) <= options["window"])
    protected = (ends | options["special"]) & real
    counts = [n if n < options["least"] else math.ceil(round(options["ratio"] * n, 6)) for n in real.sum(-1).tolist()]
    budget = torch.tensor(counts).to(mask.device)
    count = torch.maximum(budget, protected.sum(-1)).clamp_max(real.sum(-1))
    rank = _order(scores, protected.long() + real.long()).argsort(-1)
    kept = rank < count[:, None]
    chosen = _order(scores, 2 * kept.long() + (~real).long())[:, : int(count.max())].sort(-1).values
    if bool((real & ~kept).gather(1, chosen).any()):
        raise ValueError("rows keep different numbers of tokens; pass prompts of one length, or one at a time")
    return chosen


def _order(scores: Tensor, tier: Tensor) -> Tensor:
    by_score = scores.argsort(dim=-1, descending=True, stable=True)
    return by_score.gather(1, tier.gather(1, by_score).argsort(dim=-1, descending=True, stable=True))


def _take(tensor: Tensor, kept: Tensor, dim: int) -> Tensor:
    if len(tensor) == 1 and len(kept) == 1:
        return tensor.index_select(dim, kept[0])
    shape = [len(kept), *tensor.shape[1:]]
    view = [len(kept), *[1] * (tensor.ndim - 1)]
    shape[dim] = view[dim] = kept.shape[1]
    return tensor.expand(len(kept), *tensor.shape[1:]).gather(dim, kept.view(view).expand(shape))


def _special_ids(config: Any) -> set[int]:
    found: set[int] = set()
    for value in (config.bos_token_id, config.eos_token_id, config.pad_token_id):
        found.update(value if isinstance(value, list) else [] if value is None else [value])
    return found


def _check(model: Any, generation_config: Any, mask: Tensor) -> None:
    config = model.config.get_text_config(decoder=True)
    if not hasattr(model.get_decoder(), "layers") or "position_ids" not in inspect.signature(model.forward).parameters:
        raise ValueError(f"token reduction here does not know the blocks of {type(model).__name__}")
    rope = getattr(config, "rope_parameters", None) or {}
    if getattr(config, "_attn_implementation", None) == "flex_attention" or rope.get("rope_type") == "longrope":
        raise ValueError("token reduction here has neither flex_attention nor longrope")
    if set(getattr(config, "layer_types", None) or ["full_attention"]) != {"full_attention"} or (
        getattr(config, "sliding_window", None) is not None and generation_config.max_length >= config.sliding_window
    ):
        raise ValueError("token reduction here needs full attention in every layer")
    if not generation_config.use_cache or generation_config.cache_implementation not in (None, "dynamic"):
        raise ValueError("token reduction needs the dynamic cache; leave use_cache and cache_implementation out")
    if int(mask.sum(-1).max()) > config.max_position_embeddings:
        raise ValueError(f"the prompt is longer than the model's context of {config.max_position_embeddings} tokens")
