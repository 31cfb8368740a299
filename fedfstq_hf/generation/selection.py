"""From scores to kept positions: how many, what must not be dropped, and one rectangle for rows of different counts."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedfstq_hf.errors import ConfigError, DataError, NonFiniteError
from fedfstq_hf.generation.blocks import Kept


def budgets(attention_mask: Tensor, keep_ratio: float | None, keep_tokens: int | None, min_tokens: int = 0) -> Tensor:
    """(B,) int64 tokens to keep per row: `ceil(keep_ratio x real tokens)`, or at most `keep_tokens`.

    min_tokens: a row of fewer is kept whole.
    """
    lengths = attention_mask.long().sum(-1)
    ratio = 1.0 if keep_ratio is None else keep_ratio
    counts = [math.ceil(round(ratio * length, 6)) for length in lengths.tolist()]  # 0.1 x 30 is 3.0000000000000004
    wanted = torch.tensor(counts, device=lengths.device) if keep_tokens is None else lengths.clamp_max(keep_tokens)
    return torch.where(lengths < min_tokens, lengths, wanted)


def check_spans(protected: Tensor, always: Tensor, budget: Tensor) -> None:
    """Raise ConfigError if the caller's spans (B, T) do not fit into a row's budget beside what is always kept."""
    needed = (protected | always).sum(-1)
    for row, (need, have) in enumerate(zip(needed.tolist(), budget.tolist(), strict=True)):
        if bool(protected[row].any()) and need > have:
            raise ConfigError(
                f"protected spans and what is always kept need {need} tokens in row {row}, the budget is "
                f"{have}; protect less, or raise keep_ratio or keep_tokens"
            )


def select(scores: Tensor, attention_mask: Tensor, protected: Tensor, budget: Tensor) -> Kept:
    """What is kept of each row; K is the largest row's count.

    scores: (B, T), higher = keep; +inf allowed. protected: (B, T) bool, kept before all others, even beyond the budget.
    budget: (B,). A row that keeps fewer than K is filled up with its padding, then with its next best tokens, which are
    not real ones. Ties go to the earlier token. Raises NonFiniteError on NaN scores.
    """
    real = attention_mask.bool()
    if bool((scores.isnan() & real).any()):
        raise NonFiniteError(
            "token scores hold NaN; nothing was dropped. Check the model's weights and the saliency file"
        )
    protected = protected & real
    count = torch.maximum(budget, protected.sum(-1)).clamp_max(real.sum(-1))
    best = scores.float().masked_fill(~real, -torch.inf)
    tier = protected.long()
    order = _argsort_by(best, tier + real.long())  # protected, then real tokens by score, then padding
    rank = order.argsort(dim=-1)
    kept = rank < count[:, None]
    filled = _argsort_by(best, 2 * kept.long() + (~real).long())[:, : int(count.max())]
    positions = filled.sort(dim=-1).values
    return Kept(positions, kept.gather(1, positions))


def _argsort_by(scores: Tensor, tier: Tensor) -> Tensor:
    """Positions by tier, then by score, both descending, ties to the earlier position."""
    by_score = scores.argsort(dim=-1, descending=True, stable=True)
    by_tier = tier.gather(1, by_score).argsort(dim=-1, descending=True, stable=True)
    return by_score.gather(1, by_tier)


Spans = Sequence[tuple[int, int]]
MARKERS = ("<keep>", "</keep>")


@dataclass(frozen=True)
class Protection:
    """What is always kept.

    first, last: tokens at the two ends of each row. special_ids: token ids. sequences: runs of token ids, such as the
    pieces of a chat template.
    """

    first: int = 4
    last: int = 8
    special_ids: tuple[int, ...] = ()
    sequences: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        if self.first < 0 or self.last < 1:
            raise ConfigError(f"first is {self.first}, last is {self.last}; expected at least 0 and at least 1")

    def mask(self, input_ids: Tensor, attention_mask: Tensor, at_start: bool = True) -> Tensor:
        """(B, T) bool, true = keep. `at_start`: the rows begin the text (False for a later turn of a chat)."""
        real = attention_mask.bool()
        from_left, from_right = real.cumsum(-1), real.flip(-1).cumsum(-1).flip(-1)
        kept = from_right <= self.last
        if at_start:
            kept = kept | (from_left <= self.first)
        if self.special_ids:
            kept = kept | torch.isin(input_ids, torch.tensor(self.special_ids, device=input_ids.device))
        for sequence in self.sequences:
            kept = kept | _runs(input_ids, sequence)
        return kept & real


def _runs(input_ids: Tensor, sequence: tuple[int, ...]) -> Tensor:
    """(B, T) bool: true on every occurrence of `sequence`."""
    found = torch.zeros(input_ids.shape, dtype=torch.bool, device=input_ids.device)
    size = len(sequence)
    if size > input_ids.shape[1]:
        return found
    wanted = torch.tensor(sequence, device=input_ids.device)
    starts = (input_ids.unfold(1, size, 1) == wanted).all(-1)  # (B, T - size + 1)
    for offset in range(size):
        found[:, offset : offset + starts.shape[1]] |= starts
    return found


def special_ids(tokenizer: Any, config: Any) -> tuple[int, ...]:
    """Ids of special tokens: a tokenizer's own and those added as special; without one, the model's bos, eos, pad."""
    found: set[int] = set()
    if tokenizer is not None:
        found.update(tokenizer.all_special_ids)
        found.update(i for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special)
    elif config is not None:
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(config, name, None)
            found.update(value if isinstance(value, list) else [] if value is None else [value])
    return tuple(sorted(found))


def template_sequences(tokenizer: Any) -> tuple[tuple[int, ...], ...]:
    """Token runs that a tokenizer's chat template puts around messages: what is left when the messages are taken out.

    Empty without a template. Pieces that the tokenizer merges with a message's text are not found in prompts.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        return ()
    pieces: set[tuple[int, ...]] = set()
    slot = "\u241f\u241f"  # no template writes this by itself
    chat = [{"role": role, "content": slot} for role in ("user", "assistant", "user")]
    for messages in (chat, [{"role": "system", "content": slot}, *chat]):
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception:  # templates raise what they like, for example where there is no system role
            continue
        for piece in text.split(slot):
            ids = tuple(tokenizer(piece, add_special_tokens=False)["input_ids"]) if piece else ()
            if ids:
                pieces.add(ids)
    return tuple(sorted(pieces))


def strip_markers(text: str, markers: tuple[str, str] = MARKERS) -> tuple[str, list[tuple[int, int]]]:
    """The text without markers, and the character spans that stood between them. Raises DataError if unbalanced."""
    opening, closing = markers
    plain, spans, start = "", [], None
    for piece in re.split(f"({re.escape(opening)}|{re.escape(closing)})", text):
        if piece == opening and start is None:
            start = len(plain)
        elif piece == closing and start is not None:
            spans.append((start, len(plain)))
            start = None
        elif piece in markers:
            raise DataError(f"unbalanced {piece!r} at character {len(plain)}; write {opening}text{closing}, not nested")
        else:
            plain += piece
    if start is not None:
        raise DataError(f"{opening!r} at character {start} is never closed; write {opening}text{closing}")
    return plain, spans


def protect_spans(offsets: Tensor, spans: Sequence[Spans]) -> Tensor:
    """(B, T) bool, true for tokens that overlap a character span. offsets: (B, T, 2) from the tokenizer."""
    kept = torch.zeros(offsets.shape[:2], dtype=torch.bool)
    for row, wanted in enumerate(spans):
        for start, end in wanted:
            if not 0 <= start < end:
                raise DataError(f"protected span ({start}, {end}) in row {row} is empty or negative; give (start, end)")
            begins, ends = offsets[row, :, 0], offsets[row, :, 1]
            hit = (begins < end) & (ends > start) & (ends > begins)
            if not bool(hit.any()):
                raise DataError(f"protected span ({start}, {end}) in row {row} covers no token of the text")
            kept[row] |= hit
    return kept
