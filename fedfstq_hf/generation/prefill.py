"""The shortened prefill, seen by transformers' own decoding loops as if it were the model's.

The loops keep the full prompt (logits processors, stopping criteria and the result see nothing else); only the model's
forward pass and its cache are short. Positions stay the original ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedfstq_hf.errors import DataError
from fedfstq_hf.generation.blocks import BlockInput, Kept, can_cut, cut_before, decoder_blocks
from fedfstq_hf.generation.cache import Cut, check_cuttable, cut_of, drop_entries, mark_cut, tokens_seen
from fedfstq_hf.generation.scorers import EarlyScorer, Scorer


@dataclass(frozen=True)
class Prompt:
    """The part of a prompt that the cache does not hold yet.

    input_ids, attention_mask, position_ids: (B, T). protected: (B, T) bool. seen: tokens of text before it.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    protected: Tensor
    seen: int


Choose = Callable[[Prompt, Tensor], Kept]
"""From a prompt and its scores (B, T) to what is kept."""


class ReducedModel:
    """A model whose prefill drops tokens. Everything else is the model's own; the model itself is not touched.

    Usage: `type(model)._sample(ReducedModel(...), input_ids, ...)`.
    """

    def __init__(self, model: Any, scorer: Scorer, choose: Choose, pays: Callable[[Prompt], bool], protected: Tensor):
        self.model, self._scorer, self._choose, self._pays, self._protected = model, scorer, choose, pays, protected
        self._cut: Cut | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward pass."""
        return self.model(*args, **kwargs)

    def _prefill(self, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], **kwargs: Any) -> Any:
        """Stands in for `GenerationMixin._prefill`; changes `model_kwargs` to suit the shorter cache."""
        cache: Any = model_kwargs.get("past_key_values")
        self._cut = cut_of(cache)
        prompt = self._new_part(input_ids, generation_config, model_kwargs)
        reduce = self._pays(prompt)
        if not reduce and self._cut is None:
            return self.model._prefill(input_ids, generation_config, model_kwargs, **kwargs)
        check_cuttable(cache)
        if self._cut is not None:
            self._cut.reopen()
        past = int(cache.get_seq_length())
        before = self._entries_mask(model_kwargs.get("attention_mask"), cache, past, prompt)
        if not reduce:
            outputs = self._forward(prompt, before, model_kwargs)
            kept = Kept.all_of(prompt.input_ids)
        elif isinstance(self._scorer, EarlyScorer) and can_cut(self.model):
            outputs, kept = self._forward_and_cut(prompt, before, model_kwargs, past, self._scorer)
        else:
            scores = self._scorer.scores(self.model, prompt.input_ids, prompt.attention_mask)
            kept = self._choose(prompt, scores)
            outputs = self._forward(gathered(prompt, kept), before, model_kwargs)
        mask = torch.cat([before, prompt.attention_mask.gather(1, kept.positions) * kept.real], dim=1)
        dropped = prompt.input_ids.shape[1] - kept.positions.shape[1]
        self._cut = mark_cut(cache, dropped, mask)
        model_kwargs["attention_mask"] = mask if bool((mask == 0).any()) else None
        return outputs

    def close(self) -> None:
        """The call is over: from now on the cut cache refuses anyone else."""
        if self._cut is not None:
            self._cut.access = "closed"

    def _new_part(self, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any]) -> Prompt:
        """Follows generate(): ids as long as the mask are the whole text, shorter ones only what is new."""
        mask, positions = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
        seen = tokens_seen(model_kwargs["past_key_values"]) if model_kwargs.get("past_key_values") is not None else 0
        mask_length = mask.shape[1] if mask is not None else getattr(generation_config, "_mask_length", -1)
        new = input_ids.shape[1] - (seen if mask_length == input_ids.shape[1] else 0)
        if new <= 0:
            raise DataError(
                f"the cache already stands for {seen} tokens, the prompt has {input_ids.shape[1]}; pass "
                "the whole text so far with something new at its end, or an empty cache"
            )
        ids = input_ids[:, -new:]
        real = torch.ones_like(ids) if mask is None else mask[:, -new:].long()
        if positions is None or positions.ndim != 2:  # of a model that tokens cannot be dropped from; `_pays` says so
            positions = (real.cumsum(-1) - 1).clamp_min(0)
        return Prompt(
            ids,
            real,
            positions[:, -new:].expand(ids.shape[0], -1),
            self._protected[:, -new:],
            seen,
        )

    @staticmethod
    def _entries_mask(mask: Tensor | None, cache: Any, past: int, prompt: Prompt) -> Tensor:
        """(B, past) mask of the entries already in the cache: of the last prefill, then of text since then."""
        rows = prompt.input_ids.shape[0]
        text = torch.ones(rows, prompt.seen, dtype=torch.long, device=prompt.input_ids.device)
        if mask is not None:
            text = mask[:, : prompt.seen].long()
        cut = cut_of(cache)
        if cut is None or cut.mask is None:
            return text[:, prompt.seen - past :]
        since = past - cut.mask.shape[1]
        return torch.cat([cut.mask, text[:, prompt.seen - since :]], dim=1)

    def _forward(self, prompt: Prompt, before: Tensor, model_kwargs: dict[str, Any]) -> Any:
        mask = torch.cat([before, prompt.attention_mask], dim=1)
        changed = {
            "attention_mask": mask if bool((mask == 0).any()) else None,
            "position_ids": prompt.position_ids,
            "next_sequence_length": None,
            "is_first_iteration": True,
        }
        inputs = self.model.prepare_inputs_for_generation(prompt.input_ids, **{**model_kwargs, **changed})
        return self.model(**inputs, return_dict=True)

    def _forward_and_cut(
        self, prompt: Prompt, before: Tensor, model_kwargs: dict[str, Any], past: int, scorer: EarlyScorer
    ) -> tuple[Any, Kept]:
        """The first blocks see all tokens, the others the kept ones; the first blocks' cache is cut afterwards."""

        def choose(inputs: BlockInput) -> Kept:
            return self._choose(prompt, scorer.score_block(inputs))

        args = (self.model, scorer.layer, prompt.input_ids, prompt.attention_mask, past, choose)
        with cut_before(*args) as chosen:
            outputs = self._forward(prompt, before, model_kwargs)
        (kept,) = chosen
        for layer in outputs.past_key_values.layers[: min(scorer.layer, len(decoder_blocks(self.model)))]:
            drop_entries(layer, kept.positions, past)
        return outputs, kept


def gathered(prompt: Prompt, kept: Kept) -> Prompt:
    """Only what is kept of a prompt."""
    at = kept.positions
    return Prompt(
        prompt.input_ids.gather(1, at),
        prompt.attention_mask.gather(1, at) * kept.real,
        prompt.position_ids.gather(1, at),
        prompt.protected.gather(1, at),
        prompt.seen,
    )
