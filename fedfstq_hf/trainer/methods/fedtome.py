"""Fed-ToMe's local training: the prompt's most similar tokens are merged early in the forward pass.

ToMe (Bolya et al., ICLR 2023, https://arxiv.org/abs/2210.09461) merges image tokens by bipartite soft matching: every
other token is a candidate, each candidate's partner is the most similar of the others by the cosine of their attention
keys (mean over heads), the r most similar pairs become their mean, and later attention adds the log of a token's size.
The Fed-FSTQ paper names Fed-ToMe as a baseline and does not define it for causal models. What is ours:

- Only prompt tokens are merged: none that is a label, none that predicts one, and not the first.
- A token goes into a *later* one, so that no position sees what comes after it.
- Once, before one block, instead of r tokens in each; r is a share of each prompt's own tokens.
- The merged positions come back as zeros behind the last block, where no loss looks at them: whatever computes the loss
  sees the usual shapes.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedfstq_hf.errors import ConfigError, DataError
from fedfstq_hf.generation.attention import content_keys
from fedfstq_hf.generation.blocks import (
    BlockInput,
    Kept,
    base_of,
    block_at,
    can_cut,
    cut_before,
    decoder_blocks,
    read_block,
)
from fedfstq_hf.trainer.methods.hooks import LocalMethod, MicroBatch
from fedfstq_hf.workloads.examples import IGNORED_LABEL

_MASKS = ("sdpa", "eager")


def mergeable_tokens(labels: Tensor, attention_mask: Tensor) -> Tensor:
    """(B, T) bool: real tokens, but for the first, that are no label and predict none."""
    real = attention_mask.bool()
    target = F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL) != IGNORED_LABEL
    first = real & (real.cumsum(1) == 1)
    return real & ~first & (labels == IGNORED_LABEL) & ~target


def match(keys: Tensor, mergeable: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    """Bipartite soft matching, row by row.

    Args:
        keys: (B, T, D) of which cosines are taken.
        mergeable: (B, T) bool. Of these, numbers 0, 2, 4, ... are candidates and the others their partners.
        ratio: share of a row's mergeable tokens that are merged, rounded down.

    Returns:
        merged (B, T) bool, and partner (B, T) int64: the later token that each merged one goes into.
    """
    number = mergeable.cumsum(1) - 1
    candidate, partner = mergeable & (number % 2 == 0), mergeable & (number % 2 == 1)
    unit = F.normalize(keys.float(), dim=-1)
    places = torch.arange(keys.shape[1], device=keys.device)
    allowed = candidate[:, :, None] & partner[:, None, :] & (places[None, :] > places[:, None])
    best, chosen = (unit @ unit.transpose(1, 2)).masked_fill(~allowed, -torch.inf).max(dim=2)
    rank = best.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    wanted = (mergeable.sum(1) * ratio + 1e-6).long()
    return (rank < wanted[:, None]) & best.isfinite(), chosen


def rectangular(merged: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """Make all rows keep the same number of positions: padding goes first, and where there is too little, merges do.

    Args:
        merged: (B, T) bool. A row that would be shorter than the others with all its padding dropped merges fewer,
            its last ones.
        real: (B, T) bool, False on padding.

    Returns:
        merged, perhaps fewer, and kept (B, K) int64, ascending.
    """
    length, count = real.shape[1], merged.sum(1)
    width = int((real.sum(1) - count).max())
    merged = merged & (merged.cumsum(1) <= length - width)
    spare = width - (real.sum(1) - merged.sum(1))
    keep = torch.where(real, ~merged, (~real).cumsum(1) <= spare[:, None])
    return merged, keep.nonzero()[:, 1].view(len(real), width)


def merge(hidden: Tensor, merged: Tensor, partner: Tensor) -> tuple[Tensor, Tensor]:
    """Put merged tokens into their partners: hidden (B, T, H) with means there, and sizes (B, T) float32."""
    weight = merged.to(hidden.dtype)
    partner = torch.where(merged, partner, torch.zeros_like(partner))
    sizes = torch.ones_like(partner, dtype=torch.float32).scatter_add(1, partner, merged.float())
    index = partner[:, :, None].expand_as(hidden)
    total = hidden.scatter_add(1, index, hidden * weight[:, :, None])
    return total / sizes[:, :, None].to(hidden.dtype), sizes


class FedToMe(LocalMethod):
    """Merges prompt tokens before one decoder block, forward and backward.

    Args:
        model: base or PEFT model, a causal language model.
        ratio: share of the prompt's mergeable tokens, at most 0.5.
        layer: the block before which they are merged.

    Raises:
        ConfigError: the model's decoder cannot work on fewer tokens from some block on, or its attention takes no mask
            of numbers.
    """

    name = "fedtome"

    def __init__(self, model: nn.Module, ratio: float, layer: int) -> None:
        self._model, self.ratio, self.layer = model, ratio, layer
        base = base_of(model)
        block_at(model, layer)
        implementation = base.config._attn_implementation
        if not can_cut(model):
            raise ConfigError(
                f"token_merge_ratio: {type(base).__name__} gives its result the shape of its input: no tokens can be "
                "merged within it. Use token_merge_ratio=0."
            )
        if implementation not in _MASKS:
            raise ConfigError(
                f"token_merge_ratio weighs merged tokens in the attention mask, which {implementation!r} does not "
                "take. Load the model with attn_implementation='sdpa'."
            )

    def forward(self, batch: MicroBatch) -> AbstractContextManager[None]:
        """The micro-batch needs `input_ids` and `labels`."""
        return self.merging(batch.inputs)

    @contextmanager
    def merging(self, inputs: Mapping[str, Any]) -> Iterator[None]:
        """Within it, forward passes of these inputs merge tokens."""
        if "labels" not in inputs or "input_ids" not in inputs:
            raise DataError("token_merge_ratio needs input_ids and labels in every batch, to know what is prompt.")
        ids, labels = inputs["input_ids"], inputs["labels"]
        mask = inputs.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        state: dict[str, Tensor] = {}

        def merge_tokens(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given = read_block(block, args, kwargs, ids, mask)
            device = given.hidden.device
            with torch.no_grad():
                keys = content_keys(given).mean(dim=1)
                merged, partner = match(keys, mergeable_tokens(labels, mask).to(device), self.ratio)
                merged, state["kept"] = rectangular(merged, mask.bool().to(device))
            hidden, sizes = merge(given.hidden, merged, partner)
            state["sizes"] = sizes.gather(1, state["kept"])
            return _with(block, args, kwargs, "hidden_states", hidden)

        def weigh(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given = _argument(block, args, kwargs, "attention_mask")
            hidden = _argument(block, args, kwargs, "hidden_states")
            return _with(block, args, kwargs, "attention_mask", _proportional(given, state["sizes"], hidden.dtype))

        def restore(decoder: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            kept, short = state["kept"], output[0]
            index = kept[:, :, None].expand_as(short)
            whole = short.new_zeros(len(ids), ids.shape[1], short.shape[2]).scatter(1, index, short)
            if isinstance(output, tuple):
                return (whole, *output[1:])
            output.last_hidden_state = whole
            return output

        blocks = list(decoder_blocks(self._model))[self.layer :]
        handles = [blocks[0].register_forward_pre_hook(merge_tokens, with_kwargs=True)]
        try:

            def choose(given: BlockInput) -> Kept:
                return Kept(state["kept"], torch.ones_like(state["kept"], dtype=torch.bool))

            # backward passes that run a block again may do so in a thread of their own
            with cut_before(self._model, self.layer, ids, mask, 0, choose, any_thread=True):
                handles += [block.register_forward_pre_hook(weigh, with_kwargs=True) for block in blocks]
                handles.append(base_of(self._model).get_decoder().register_forward_hook(restore))
                yield
        finally:
            for handle in handles:
                handle.remove()


def _proportional(mask: Tensor | None, sizes: Tensor, dtype: torch.dtype) -> Tensor:
    """An attention mask of numbers, (B, 1, K, K), with the log of each token's size added to its column."""
    if mask is None:
        length = sizes.shape[1]
        mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=sizes.device).tril()
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
    return mask + sizes.log().to(mask.dtype)[:, None, None, :]


def _argument(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    return (dict(zip(inspect.signature(block.forward).parameters, args, strict=False)) | kwargs).get(name)


def _with(
    block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str, value: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a block with one replaced."""
    place = list(inspect.signature(block.forward).parameters).index(name)
    if place < len(args):
        return (*args[:place], value, *args[place + 1 :]), kwargs
    return args, {**kwargs, name: value}
