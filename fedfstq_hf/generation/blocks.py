"""The decoder blocks of a causal LM: finding them, and dropping tokens between two of them during one forward pass."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedfstq_hf.errors import ConfigError


@dataclass(frozen=True)
class BlockInput:
    """What reaches a decoder block during the prefill of a whole prompt.

    hidden: (B, T, H). given: all that it is called with, by name. input_ids, attention_mask: (B, T) of the same tokens,
    1 = real token.
    """

    block: nn.Module
    hidden: Tensor
    given: dict[str, Any]
    input_ids: Tensor
    attention_mask: Tensor


@dataclass(frozen=True)
class Kept:
    """Kept tokens: their positions (B, K), ascending, and which of them are real, (B, K) bool.

    The others fill up rows that keep fewer than K: a mask hides them.
    """

    positions: Tensor
    real: Tensor

    @classmethod
    def all_of(cls, ids: Tensor) -> Kept:
        """Every one of (B, T)."""
        positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        return cls(positions, torch.ones_like(positions, dtype=torch.bool))


def base_of(model: Any) -> Any:
    """The transformers model inside a `PeftModel`, with its adapter layers; any other model as it is."""
    inner = getattr(model, "get_base_model", None)
    return model if inner is None else inner()


def decoder_blocks(model: Any) -> nn.ModuleList:
    """The stack of decoder blocks. Raises ConfigError for a model whose decoder has no such list."""
    base = base_of(model)
    decoder = base.get_decoder()
    count = base.config.get_text_config(decoder=True).num_hidden_layers
    for child in decoder.children():
        if isinstance(child, nn.ModuleList) and len(child) == count:
            return child
    raise ConfigError(
        f"{type(decoder).__name__} has no list of {count} decoder blocks; use a scorer that reads no hidden states, "
        "for example TokenReducer(scorer=Rarity())"
    )


def can_cut(model: Any) -> bool:
    """Whether tokens may be dropped between two blocks.

    Decoders of GPT-2's generation, whose stack is called `h`, give their result the shape of their input: they run the
    first blocks for the scores and begin again with the kept tokens.
    """
    return any(name == "layers" for name, _ in base_of(model).get_decoder().named_children())


def block_at(model: Any, layer: int) -> nn.Module:
    """Block number `layer`. Raises ConfigError if the model has too few."""
    blocks = decoder_blocks(model)
    if not 0 <= layer < len(blocks):
        raise ConfigError(f"layer is {layer}; this model has blocks 0 .. {len(blocks) - 1}")
    return blocks[layer]


def take(tensor: Tensor, kept: Tensor, dim: int) -> Tensor:
    """`tensor` with its entries `kept` (B, K) along `dim`, row by row of its first dimension (1 or B rows)."""
    if tensor.shape[0] == 1 and kept.shape[0] == 1:
        return tensor.index_select(dim, kept[0])
    shape = list(tensor.shape)
    shape[0] = kept.shape[0]
    view = [1] * tensor.ndim
    view[0], view[dim] = kept.shape
    shape[dim] = kept.shape[1]
    source = tensor.expand(kept.shape[0], *tensor.shape[1:])
    return source.gather(dim, kept.view(view).expand(shape))


class _Cutter:
    """Cuts whatever a block is given along the sequence, whichever way its model passes it.

    past: entries in the cache before this prompt; they stay. length: tokens before the cut. kept: (B, K) ascending.
    real: (B, K) bool, False for what only fills a row up and must not be seen.
    """

    def __init__(self, kept: Tensor, real: Tensor, length: int, past: int) -> None:
        self.kept, self.real, self.length = kept, real, length
        before = torch.arange(past, device=kept.device).expand(kept.shape[0], -1)
        self.columns = torch.cat([before, kept + past], dim=1)
        self._done: dict[int, tuple[Tensor, Tensor]] = {}

    def hide(self, mask: Any, implementation: str) -> Any:
        """A block's mask, already cut, that shows no token which only fills a row up."""
        if bool(self.real.all()):
            return mask
        past = self.columns.shape[1] - self.kept.shape[1]
        seen = torch.cat([torch.ones_like(self.columns[:, :past], dtype=torch.bool), self.real], dim=1)
        if isinstance(mask, Tensor) and mask.ndim == 2:
            return mask * seen.to(mask.dtype)
        if isinstance(mask, Tensor) and mask.ndim == 4:
            hidden = ~seen[:, None, None, :]
            return mask & ~hidden if mask.dtype == torch.bool else mask.masked_fill(hidden, torch.finfo(mask.dtype).min)
        if mask is not None:
            raise ConfigError(
                f"rows keep different numbers of tokens, and a mask of type {type(mask).__name__} cannot "
                "hide what fills them up; pass one prompt at a time"
            )
        if "flash" in implementation:
            return seen.long()
        causal = torch.ones(self.kept.shape[1], seen.shape[1], dtype=torch.bool, device=seen.device).tril(past)
        return causal & seen[:, None, None, :]

    def __call__(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in self._done:  # the same mask and rotary tables go to every block
                self._done[id(value)] = (value, self._cut(value))
            return self._done[id(value)][1]
        if type(value) in (tuple, list):
            return type(value)(self(item) for item in value)
        return value

    def _cut(self, tensor: Tensor) -> Tensor:
        total = self.columns.shape[1] - self.kept.shape[1] + self.length
        if tensor.ndim == 4 and tensor.shape[-2:] == (self.length, total):
            return take(take(tensor, self.kept, 2), self.columns, 3)
        if tensor.ndim == 3 and tensor.shape[1] == self.length:
            return take(tensor, self.kept, 1)
        if tensor.ndim == 2 and tensor.shape[1] == total and total != self.length:
            return take(tensor, self.columns, 1)
        if tensor.ndim == 2 and tensor.shape[1] == self.length:
            return take(tensor, self.kept, 1)
        return tensor


def read_block(
    block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], ids: Tensor, mask: Tensor
) -> BlockInput:
    """What a block is about to be called with."""
    names = list(inspect.signature(block.forward).parameters)
    given = dict(zip(names, args, strict=False)) | kwargs
    return BlockInput(block, given[names[0]], given, ids, mask)


@contextmanager
def cut_before(
    model: Any,
    layer: int,
    input_ids: Tensor,
    attention_mask: Tensor,
    past: int,
    choose: Callable[[BlockInput], Kept],
    *,
    any_thread: bool = False,
) -> Iterator[list[Kept]]:
    """While it is open, one forward pass of this thread drops tokens before block `layer`; the hooks go when it closes.

    choose: from what reaches that block to the tokens that are kept. Yields a list that then holds them. The caller
    cuts the cache of the blocks before. Other threads may run the same model meanwhile, unless `any_thread` counts.
    """
    chosen: list[Kept] = []
    cutters: list[_Cutter] = []
    owner = None if any_thread else threading.get_ident()
    implementation = str(getattr(base_of(model).config, "_attn_implementation", ""))

    def first(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        if (
            owner not in (None, threading.get_ident()) or kwargs is None
        ):  # a hook that another thread takes away has no keywords
            return None
        kept = choose(read_block(block, args, kwargs, input_ids, attention_mask))
        chosen.append(kept)
        cutters.append(_Cutter(kept.positions, kept.real, input_ids.shape[1], past))
        return later(block, args, kwargs)

    def later(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        if owner not in (None, threading.get_ident()) or kwargs is None:
            return None
        cut = cutters[0]
        if cut.kept.shape[1] == cut.length and bool(cut.real.all()):
            return None
        changed = {name: cut(value) for name, value in kwargs.items()}
        if "attention_mask" in changed:
            changed["attention_mask"] = cut.hide(changed["attention_mask"], implementation)
        return tuple(cut(value) for value in args), changed

    block_at(model, layer)
    handles = [
        block.register_forward_pre_hook(first if number == layer else later, with_kwargs=True)
        for number, block in enumerate(decoder_blocks(model))
        if number >= layer
    ]
    try:
        yield chosen
    finally:
        for handle in handles:
            handle.remove()


class _Reached(Exception):
    """Ends a forward pass at the block that was asked for."""


@torch.no_grad()
def read_at(model: Any, layer: int, input_ids: Tensor, attention_mask: Tensor) -> BlockInput:
    """Run embedding and the first `layer` blocks over a prompt, and nothing after them. (B, T) both."""
    found: list[BlockInput] = []

    owner = threading.get_ident()

    def stop(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        if threading.get_ident() != owner or kwargs is None:
            return
        found.append(read_block(block, args, kwargs, input_ids, attention_mask))
        raise _Reached

    positions = (attention_mask.long().cumsum(-1) - 1).clamp_min(0)
    padded = bool((attention_mask == 0).any())
    handle = block_at(model, layer).register_forward_pre_hook(stop, with_kwargs=True)
    try:
        base_of(model).get_decoder()(
            input_ids=input_ids,
            attention_mask=attention_mask if padded else None,
            position_ids=positions,
            use_cache=False,
        )
    except _Reached:
        pass
    finally:
        handle.remove()
    return found[0]
