"""Token reduction for plain `generate()`: a logits processor that cuts the cache after the prefill."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor

from fedfstq_hf.errors import ConfigError, DataError
from fedfstq_hf.generation.blocks import base_of
from fedfstq_hf.generation.cache import check_cuttable, cut_of, drop_entries, mark_cut
from fedfstq_hf.generation.reducer import TokenReducer


class TokenReductionLogitsProcessor(LogitsProcessor):  # type: ignore[misc]
    """Drops the cache entries of the least salient prompt tokens once the prompt has been read.

    Saves memory and decoding time, and no prefill time: the whole prompt goes through the model first, and a scorer
    that reads hidden states runs the first layers again. For prefill time use `generate(custom_generate=reducer)`. The
    first new token is that of the whole prompt. Usage:

        processor = TokenReductionLogitsProcessor(reducer, model)
        model.generate(**inputs, past_key_values=processor.cache, logits_processor=[processor])

    Sliding-window layers are left as they are: they hold no more than their window anyway.

    One processor serves one call. Padded batches are refused, since plain generate() goes on with the mask of the whole
    prompt. Afterwards the cache refuses plain generate(); a `TokenReducer` can go on with it.

    Args:
        reducer: decides what is kept. model: the model that generates. cache: shared with the call; made if not given.
    """

    def __init__(self, reducer: TokenReducer, model: Any, cache: DynamicCache | None = None) -> None:
        self.reducer, self.model = reducer, model
        self.cache = DynamicCache(config=base_of(model).config) if cache is None else cache
        self._done = False

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Cuts the cache at the first step; returns `scores` (batch, vocab_size) unchanged."""
        if not self._done:
            self._done = True
            self._cut(input_ids)
        return scores

    def _cut(self, input_ids: Tensor) -> None:
        if cut_of(self.cache) is not None or self.cache.get_seq_length() != input_ids.shape[1]:
            raise ConfigError(
                f"the processor's cache has {self.cache.get_seq_length()} entries after a prompt of "
                f"{input_ids.shape[1]} tokens; make a new processor for each call and pass "
                "past_key_values=processor.cache"
            )
        check_cuttable(self.cache)
        self._refuse_padding(input_ids)
        mask = torch.ones_like(input_ids)
        chosen = self.reducer.kept(input_ids, mask, self.model)
        if not bool(chosen.real.all()):
            raise DataError(
                "rows keep different numbers of tokens; pass one prompt at a time, or custom_generate=reducer"
            )
        kept = chosen.positions
        dropped = input_ids.shape[1] - kept.shape[1]
        if not dropped:
            return
        full = [layer for layer in self.cache.layers if not layer.is_sliding]
        for layer in full:
            drop_entries(layer, kept, past=0)
        if full:
            cut = mark_cut(self.cache, dropped, mask.gather(1, kept))
            cut.access, cut.even = "decode", len(full) == len(self.cache.layers)

    def _refuse_padding(self, input_ids: Tensor) -> None:
        config = base_of(self.model).generation_config
        tokenizer_pad = getattr(self.reducer.tokenizer, "pad_token_id", None)
        pads = [pad for pad in (config.pad_token_id, tokenizer_pad) if pad is not None]
        mask = _mask_of_generate()
        hidden = mask is not None and mask.ndim == 2 and bool((mask[:, : input_ids.shape[1]] == 0).any())
        if hidden or any(bool((input_ids[:, 0] == pad).any()) for pad in pads):
            raise DataError(
                "the batch is padded; plain generate() would read the mask of the whole prompt against "
                "the cut cache. Pass one prompt at a time, prompts of one length, or custom_generate=reducer"
            )


def _mask_of_generate() -> Tensor | None:
    """The attention mask of the generate() that runs, which hands its processors none; None where it is not found."""
    frame = sys._getframe(1)
    for _ in range(12):
        arguments = frame.f_locals.get("model_kwargs")
        if isinstance(arguments, dict) and isinstance(arguments.get("attention_mask"), Tensor):
            found: Tensor = arguments["attention_mask"]
            return found
        if frame.f_back is None:
            break
        frame = frame.f_back
    return None
