"""A cache that lacks part of its text: it knows how much, and refuses to be continued by someone who does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from fedfstq_hf.errors import ConfigError
from fedfstq_hf.generation.blocks import take


@dataclass
class Cut:
    """What all layers of a cut cache share.

    dropped: tokens of the text that have no entry. mask: (B, entries) 1 = real, as it was at the end of the last
    prefill; None before the first. access: "closed", "decode" (one token at a time) or "open". even: whether all layers
    lack the same tokens; if not, nobody can go on with the cache.
    """

    dropped: int = 0
    mask: Tensor | None = None
    access: str = "open"
    even: bool = True
    first: Any = None
    """The layer that keeps `mask` in step where the cache's rows are repeated, chosen or reordered."""

    def reopen(self) -> None:
        """Let the owner of a call append whatever it wants. Raises ConfigError for layers that differ."""
        if not self.even:
            raise ConfigError(
                "this cache was cut after a prefill in its full-attention layers only, its sliding-window layers hold "
                "other tokens; start the next turn with an empty cache"
            )
        self.access = "open"

    def check(self, num_new: int) -> None:
        """Raise ConfigError unless `num_new` tokens may be appended now."""
        if self.access == "open" or not self.dropped or (self.access == "decode" and num_new == 1):
            return
        raise ConfigError(
            f"this cache lacks {self.dropped} tokens that were dropped from the prompt; plain generate() "
            "or forward() would feed tokens twice at wrong places. Go on with custom_generate=reducer, or "
            "start with an empty DynamicCache()"
        )


class _CutLayer(DynamicLayer):  # type: ignore[misc]
    cut: Cut

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.cut.check(key_states.shape[-2])
        states: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
        return states

    def reset(self) -> None:
        super().reset()
        self.cut.dropped, self.cut.mask = 0, None

    def _rows(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.cut.first is self and self.cut.mask is not None:
            self.cut.mask = change(self.cut.mask)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._rows(lambda mask: mask.index_select(0, beam_idx.to(mask.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._rows(lambda mask: mask.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._rows(lambda mask: mask[indices.to(mask.device), ...])


class _CutSlidingLayer(_CutLayer, DynamicSlidingWindowLayer):  # type: ignore[misc]
    pass


_CUT_CLASS: dict[type, Any] = {DynamicLayer: _CutLayer, DynamicSlidingWindowLayer: _CutSlidingLayer}


def cut_of(cache: Any) -> Cut | None:
    """What a cache lacks; None if nothing was ever cut from it."""
    layers = getattr(cache, "layers", None) or [None]
    return getattr(layers[0], "cut", None)


def tokens_seen(cache: Any) -> int:
    """Tokens of text that a cache stands for: its entries and those that were dropped."""
    cut = cut_of(cache)
    return int(cache.get_seq_length()) + (cut.dropped if cut is not None else 0)


def check_cuttable(cache: Any) -> None:
    """Raise ConfigError unless every layer is a plain attention layer that grows, full or sliding-window."""
    if not isinstance(cache, DynamicCache) or cache.offloading:
        raise ConfigError(
            f"token reduction needs a DynamicCache that is not offloaded, got {type(cache).__name__}; leave "
            "cache_implementation and past_key_values out, or pass past_key_values=DynamicCache(config=model.config)"
        )
    for layer in cache.layers:
        if type(layer) not in (*_CUT_CLASS, *_CUT_CLASS.values()):
            raise ConfigError(
                f"token reduction cannot drop tokens from a {type(layer).__name__} (linear attention, or a cache of "
                "another kind); use a model with attention layers only"
            )


def sliding_window(config: Any) -> int | None:
    """The narrowest sliding window among the model's layers, in tokens; None if all layers see everything."""
    windows = [
        layer.sliding_window
        for layer in DynamicCache(config=config.get_text_config(decoder=True)).layers
        if isinstance(layer, DynamicSlidingWindowLayer)
    ]
    return min(windows) if windows else None


def mark_cut(cache: Any, dropped: int, mask: Tensor | None) -> Cut:
    """Note that `dropped` more tokens of the text have no entry; from now on the cache checks who continues it."""
    cut = cut_of(cache)
    if cut is None:
        cut = Cut()
        cache.layers[:] = [_marked(layer, cut) for layer in cache.layers]
        cut.first = cache.layers[0]
    cut.dropped += dropped
    cut.mask = mask
    return cut


def _marked(layer: Any, cut: Cut) -> Any:
    marked = _CUT_CLASS[type(layer)].__new__(_CUT_CLASS[type(layer)])
    marked.__dict__.update(layer.__dict__)
    marked.cut = cut
    return marked


def drop_entries(layer: Any, kept: Tensor, past: int) -> None:
    """Keep a layer's first `past` entries and, of those after, only `kept` (B, K), counted from `past`."""
    before = torch.arange(past, device=kept.device).expand(kept.shape[0], -1)
    columns = torch.cat([before, kept + past], dim=1).to(layer.keys.device)
    removed = layer.keys.shape[-2] - columns.shape[1]
    layer.keys, layer.values = take(layer.keys, columns, 2), take(layer.values, columns, 2)
    if isinstance(layer, DynamicSlidingWindowLayer):
        layer.cumulative_length -= removed
