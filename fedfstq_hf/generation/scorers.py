"""What a scorer is, and scorers by name: one score per prompt token, higher = keep. `QueryAttention` is the default.

`Random`, `Recency` and `Rarity` look at no model: they are what a scorer has to beat. A linear probe on hidden states,
learned in training, is in probe.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from fedfstq_hf.errors import ConfigError
from fedfstq_hf.generation.attention import window_attention
from fedfstq_hf.generation.blocks import BlockInput, read_at


@runtime_checkable
class Scorer(Protocol):
    """Ranks prompt tokens without gradients. Only the order of scores within a row matters."""

    def scores(self, model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, T) float, higher = keep; what it says of padding is ignored.

        model: the causal LM (`None` is allowed for scorers that do not run it). input_ids, attention_mask: (B, T).
        """
        ...


@runtime_checkable
class EarlyScorer(Scorer, Protocol):
    """A scorer that reads the hidden states after the first `layer` decoder blocks.

    `generate()` runs those blocks once, on the whole prompt, and goes on with the kept tokens' hidden states.
    """

    @property
    def layer(self) -> int:
        """How many blocks see the whole prompt."""
        ...

    def score_block(self, inputs: BlockInput) -> Tensor:
        """(B, T) float, higher = keep, from what reaches block number `layer` (counted from 0)."""
        ...


def early_scores(scorer: EarlyScorer, model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Scores (B, T) of an early scorer on their own, from a pass that ends at its layer."""
    if model is None:
        raise ConfigError(
            f"{type(scorer).__name__} runs the model's first {scorer.layer} blocks and got no model; "
            "pass one: TokenReducer(model=model, ...)"
        )
    return scorer.score_block(read_at(model, scorer.layer, input_ids, attention_mask))


class QueryAttention:
    """Score = attention of the last `window` tokens at block `layer`: mean over the window, maximum over the heads.

    Tokens within `reach` of a high score share it, since a word's tokens and its neighbours are read together.
    FastV (arXiv 2403.06764) ranks visual tokens at this depth; SnapKV (2404.14469) pools a window's attention, over a
    cache; GemFilter (2409.17422) selects from an early layer and starts again, here the early layers' work is kept.

    layer: 2 of an N-layer model costs 2/N of a dense prefill. window, reach: tokens.
    """

    def __init__(self, layer: int = 2, window: int = 8, reach: int = 2) -> None:
        if layer < 0 or window < 1 or reach < 0:
            raise ConfigError(
                f"layer is {layer}, window {window}, reach {reach}; expected at least 0, 1 and 0, for example "
                "QueryAttention(layer=2, window=8, reach=2)"
            )
        self.layer = layer
        self.window = window
        self.reach = reach

    def scores(self, model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, T) float32 in [0, 1], higher = keep."""
        return early_scores(self, model, input_ids, attention_mask)

    def score_block(self, inputs: BlockInput) -> Tensor:
        """(B, T) float32 from what reaches block number `layer`."""
        peak = window_attention(inputs, self.window).mean(2).amax(1)  # (B, T)
        if not self.reach:
            return peak
        return F.max_pool1d(peak[:, None], 2 * self.reach + 1, stride=1, padding=self.reach)[:, 0]


class TokenTable:
    """Score = the table's entry of the token id: how strongly the loss reacted to it (Fed-FSTQ stage 1).

    It knows nothing of the question that a prompt ends with.

    table: (vocab_size,) float, higher is more sensitive, +inf for ids never seen in training (kept first), as
    `TokenSensitivity.scores()` and `Saliency.scores()` return it.
    """

    def __init__(self, table: Tensor) -> None:
        if table.ndim != 1 or not table.numel():
            raise ConfigError(f"table has shape {tuple(table.shape)}; expected (vocab_size,)")
        self.table = table.detach().float().cpu()

    def scores(self, model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, T) float32, higher = keep. Raises ConfigError for ids outside the table."""
        highest = int(input_ids.max())
        if highest >= len(self.table):
            raise ConfigError(
                f"token id {highest} is outside the table of {len(self.table)} ids; the table belongs to another "
                "tokenizer"
            )
        return self.table.to(input_ids.device)[input_ids]


class Combined:
    """Score = sum of weight x rank, ranks within the row from 0 (lowest) to 1: scales of scorers never meet.

    scorers: any number, those that read hidden states all at the same layer. weights: positive, one for each.
    """

    def __init__(self, scorers: Sequence[Scorer], weights: Sequence[float]) -> None:
        if not scorers or len(scorers) != len(weights) or min(weights) <= 0:
            raise ConfigError(
                f"got {len(scorers)} scorers with weights {list(weights)}; expected one positive weight for each, for "
                "example Combined([QueryAttention(), TokenTable(table)], [0.75, 0.25])"
            )
        layers = sorted({scorer.layer for scorer in scorers if isinstance(scorer, EarlyScorer)})
        if len(layers) > 1:
            raise ConfigError(f"scorers read hidden states at layers {layers}; give them all the same layer")
        self.parts = tuple(zip(scorers, weights, strict=True))
        self.layer = layers[0] if layers else 0

    def scores(self, model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, T) float32, higher = keep."""
        if any(isinstance(scorer, EarlyScorer) for scorer, _ in self.parts):
            return early_scores(self, model, input_ids, attention_mask)
        ranked = (
            weight * ranks(scorer.scores(model, input_ids, attention_mask), attention_mask)
            for scorer, weight in self.parts
        )
        return torch.stack(list(ranked)).sum(0)

    def score_block(self, inputs: BlockInput) -> Tensor:
        """(B, T) float32 from what reaches block number `layer`."""
        total = torch.zeros(inputs.input_ids.shape, device=inputs.hidden.device)
        for scorer, weight in self.parts:
            if isinstance(scorer, EarlyScorer):
                part = scorer.score_block(inputs)
            else:
                part = scorer.scores(None, inputs.input_ids, inputs.attention_mask)
            total += weight * ranks(part, inputs.attention_mask)
        return total


def ranks(scores: Tensor, attention_mask: Tensor) -> Tensor:
    """(B, T) float32: the share of the row's real tokens that score lower; equal scores share one rank."""
    scores = scores.float().masked_fill(attention_mask == 0, -torch.inf)
    ordered = scores.sort(dim=-1).values
    below = torch.searchsorted(ordered, scores) - (attention_mask == 0).sum(-1, keepdim=True)
    return below.clamp_min(0) / attention_mask.sum(-1, keepdim=True).clamp_min(1)


class Random:
    """Uniform scores that depend on the seed and the row's own tokens, so that a prompt always gets the same ones."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def scores(self, model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, T) float32 in [0, 1), higher = keep."""
        rows = []
        for ids, mask in zip(input_ids.cpu(), attention_mask.cpu().bool(), strict=True):
            key = hash((self.seed, *ids[mask].tolist())) & (2**63 - 1)
            drawn = torch.rand(int(mask.sum()), generator=torch.Generator().manual_seed(key))
            rows.append(torch.zeros(len(ids)).masked_scatter(mask, drawn))
        return torch.stack(rows).to(input_ids.device)


class Recency:
    """Score = position (StreamingLLM, arXiv 2309.17453, applied to the prompt). With the first tokens,
    which are always kept: sinks and a sliding window."""

    def scores(self, model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, T) float32, higher = keep."""
        return torch.arange(input_ids.shape[1], device=input_ids.device).float().expand(input_ids.shape)


class Rarity:
    """Score = -log frequency of the id (self-information under a unigram model, arXiv 2310.06201).

    counts: (vocab_size,) occurrences in some corpus; None counts within the prompt at hand.
    """

    def __init__(self, counts: Tensor | None = None) -> None:
        self.counts = counts

    def scores(self, model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, T) float32, higher = keep."""
        if self.counts is not None:
            counts = self.counts.to(input_ids.device)
            if int(input_ids.max()) >= len(counts):
                raise ConfigError(f"token id {int(input_ids.max())} is outside the counts of {len(counts)} ids")
            return -(counts.float() + 1.0)[input_ids].log()
        rows = []
        for ids, mask in zip(input_ids, attention_mask.bool(), strict=True):
            _, inverse, count = ids[mask].unique(return_inverse=True, return_counts=True)
            rows.append(torch.zeros(ids.shape, device=ids.device).masked_scatter(mask, -count[inverse].float().log()))
        return torch.stack(rows)
