"""Token-reduced `generate()` for an adapter's repo; needs transformers (5.20 or newer) and torch, nothing else.

    model.generate(**inputs, custom_generate="ORG/REPO", revision="COMMIT", trust_remote_code=True, keep_ratio=0.5)

It is code, and runs with your rights. Whoever can write to ORG/REPO can change it at any time, so name the full sha of
a commit whose file you have read.

The first `layer` blocks see the whole prompt; then the tokens that the prompt's last `window` tokens attend to least
are dropped, and the other blocks and the cache hold the rest, at their original positions. The result is the whole
prompt and the new tokens. Decoders of the Llama build (blocks in `layers`, with `q_proj` and `k_proj`); greedy search,
sampling, beams, streamers, left-padded batches. A cache cannot be passed in or kept.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

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

        def before(block: Any, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
            if not chosen:
                hidden = given["hidden_states"] if "hidden_states" in given else args[0]
                scores = _scores(block, hidden, given["position_embeddings"], self.mask, self.options)
                chosen.append(_choose(scores, self.mask, self.options))
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


def _scores(block: Any, hidden: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor, options: dict[str, Any]) -> Tensor:
    """(B, T) attention of the last window: mean over the window, maximum over heads, shared among neighbours."""
    attention, states = block.self_attn, block.input_layernorm(hidden)
    size, window, length = attention.head_dim, min(options["window"], hidden.shape[1]), hidden.shape[1]
    query = attention.q_proj(states[:, -window:]).view(len(hidden), window, -1, size).transpose(1, 2)
    key = attention.k_proj(states).view(len(hidden), length, -1, size).transpose(1, 2)
    if getattr(attention, "q_norm", None) is not None:
        query, key = attention.q_norm(query), attention.k_norm(key)
    cos, sin = (part.unsqueeze(1) for part in rotary)
    query, key = _rotate(query, cos[:, :, -window:], sin[:, :, -window:]), _rotate(key, cos, sin)
    grouped = query.view(len(hidden), key.shape[1], -1, window, size)
    logits = (grouped @ key.transpose(-1, -2).unsqueeze(2)).float() * attention.scaling
    places = torch.arange(length, device=hidden.device)
    allowed = (places <= places[length - window :, None]) & mask.bool()[:, None, :]
    logits = logits.masked_fill(~allowed[:, None, None], torch.finfo(torch.float32).min)
    peak = logits.softmax(-1).mean(3).flatten(1, 2).amax(1)
    return F.max_pool1d(peak[:, None], 2 * options["reach"] + 1, stride=1, padding=options["reach"])[:, 0]


def _choose(scores: Tensor, mask: Tensor, options: dict[str, Any]) -> Tensor:
    """(B, K) kept positions, ascending; rows that keep fewer than K are filled up with padding, then next best."""
    real = mask.bool()
    ends = (real.cumsum(-1) <= options["first"]) | (real.flip(-1).cumsum(-1).flip(-1) <= options["window"])
    protected = (ends | options["special"]) & real
    budget = torch.tensor([math.ceil(round(options["ratio"] * n, 6)) for n in real.sum(-1).tolist()]).to(mask.device)
    count = torch.maximum(budget, protected.sum(-1)).clamp_max(real.sum(-1))
    rank = _order(scores, protected.long() + real.long()).argsort(-1)
    kept = rank < count[:, None]
    return _order(scores, 2 * kept.long() + (~real).long())[:, : int(count.max())].sort(-1).values


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


def _rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = states.shape[-1] // 2
    return states * cos + torch.cat([-states[..., half:], states[..., :half]], dim=-1) * sin


def _special_ids(config: Any) -> set[int]:
    found: set[int] = set()
    for value in (config.bos_token_id, config.eos_token_id, config.pad_token_id):
        found.update(value if isinstance(value, list) else [] if value is None else [value])
    return found


def _check(model: Any, generation_config: Any, mask: Tensor) -> None:
    config = model.config.get_text_config(decoder=True)
    first_block = next(iter(getattr(model.get_decoder(), "layers", [])), None)
    if getattr(getattr(first_block, "self_attn", None), "q_proj", None) is None:
        raise ValueError(f"token reduction here does not know the blocks of {type(model).__name__}")
    if set(getattr(config, "layer_types", None) or ["full_attention"]) != {"full_attention"} or (
        getattr(config, "sliding_window", None) is not None and generation_config.max_length >= config.sliding_window
    ):
        raise ValueError("token reduction here needs full attention in every layer")
    if not generation_config.use_cache or generation_config.cache_implementation not in (None, "dynamic"):
        raise ValueError("token reduction needs the dynamic cache; leave use_cache and cache_implementation out")
    if int(mask.sum(-1).max()) > config.max_position_embeddings:
        raise ValueError(f"the prompt is longer than the model's context of {config.max_position_embeddings} tokens")
