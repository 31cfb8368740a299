"""What a federation learned about token ids, in a form to share: scores, how often seen (coarsely), a probe."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fedfstq_hf.errors import AdapterMismatchError, ConfigError, DataError
from fedfstq_hf.generation.scorers.probe import Probe
from fedfstq_hf.sensitivity import TokenSensitivity

EDGES = (1, 4, 32)
"""Counts from which an id is level 1, 2 or 3; nothing finer than the level is ever written."""
_COUNT_OF_LEVEL = torch.tensor([0.0, 2.0, 11.0, 64.0], dtype=torch.float64)  # what a level weighs in `aggregate`


@dataclass(frozen=True)
class Saliency:
    """Scores of token ids, and optionally a probe.

    log_scores: (vocab_size,) float32, log2 of the sensitivity; only differences between ids mean something.
    levels: (vocab_size,) uint8 in 0 .. 3, how often an id was seen; 0 is never, and its log score means nothing.
    probe: from hidden states, or None. tokenizer: `tokenizer_fingerprint`. base: what identifies the base model, may
    be empty.
    """

    log_scores: Tensor
    levels: Tensor
    tokenizer: str
    base: Mapping[str, Any] = field(default_factory=dict)
    probe: Probe | None = None

    def __post_init__(self) -> None:
        if self.log_scores.ndim != 1 or self.log_scores.shape != self.levels.shape or not self.levels.numel():
            raise DataError(
                f"log_scores and levels have shapes {tuple(self.log_scores.shape)} and {tuple(self.levels.shape)}; "
                "expected the same (vocab_size,), not empty"
            )
        if int(self.levels.max()) > 3 or not bool(torch.isfinite(self.log_scores[self.levels > 0]).all()):
            raise DataError("a saliency table holds levels above 3, or scores that are NaN or infinite")

    @classmethod
    def from_sensitivity(
        cls, table: TokenSensitivity, tokenizer: str, base: Mapping[str, Any] | None = None, probe: Probe | None = None
    ) -> Saliency:
        """One client's table, counts reduced to levels. An id with gradient 0 gets the lowest of the other scores."""
        scores, counts = table.scores().double(), table.state_dict()["count"]
        seen = counts > 0
        if not bool(seen.any()):
            raise DataError("the token table has seen no token yet; take it after the first refresh step")
        positive = seen & (scores > 0)
        floor = scores[positive].min() if bool(positive.any()) else torch.tensor(1.0, dtype=torch.float64)
        log_scores = torch.where(seen, scores.clamp_min(floor), 1.0).log2().float()
        levels = torch.bucketize(counts, torch.tensor(EDGES), right=True).to(torch.uint8)
        return cls(log_scores, levels, tokenizer, dict(base or {}), probe)

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return len(self.levels)

    def scores(self) -> Tensor:
        """(vocab_size,) float32 for `TokenTable`; +inf for ids never seen: rare tokens must not be dropped first."""
        return torch.where(self.levels > 0, self.log_scores, torch.inf)


def aggregate(tables: Sequence[Saliency], weights: Sequence[float], min_clients: int = 1) -> Saliency:
    """One table from those of several clients, in the given order: the same tables always give the same result.

    Each table is first centred on its own mean, since a client's loss sets the scale of its gradients. An id's score is
    then the mean of the log scores of the clients that saw it, weighted by `weights` (examples, say) times the level's
    count. An id that fewer than `min_clients` saw becomes one never seen, so that it does not point at a single client.
    The probe is the weighted mean, if every table has one at the same layer.

    Raises:
        ConfigError: no tables, or weights that are not positive. AdapterMismatchError: tables of different tokenizers,
            bases or vocabularies.
    """
    if not tables or len(tables) != len(weights) or min(weights) <= 0 or min_clients < 1:
        raise ConfigError(
            f"got {len(tables)} tables, weights {list(weights)}, min_clients {min_clients}; expected at "
            "least one table, a positive weight for each and min_clients >= 1"
        )
    first = tables[0]
    for number, table in enumerate(tables):
        if (table.vocab_size, table.tokenizer, table.base) != (first.vocab_size, first.tokenizer, first.base):
            raise AdapterMismatchError(
                f"table {number} is for {table.vocab_size} ids of tokenizer {table.tokenizer[:12]}, the first for "
                f"{first.vocab_size} of {first.tokenizer[:12]}, or their bases differ; only tables of one "
                "base can be joined"
            )
    total = torch.zeros(first.vocab_size, dtype=torch.float64)
    mass, counts, clients = total.clone(), total.clone(), total.clone()
    for table, weight in zip(tables, weights, strict=True):
        times = _COUNT_OF_LEVEL[table.levels.long()]
        values = torch.where(table.levels > 0, table.log_scores, 0.0).double()
        centred = values - (values * times).sum() / times.sum().clamp_min(1.0)
        total += weight * times * centred
        mass += weight * times
        counts += times
        clients += table.levels > 0
    public = clients >= min_clients
    levels = torch.bucketize(counts.long(), torch.tensor(EDGES), right=True)
    return Saliency(
        (total / mass.clamp_min(1e-300)).masked_fill(~public, 0.0).float(),
        levels.masked_fill(~public, 0).to(torch.uint8),
        first.tokenizer,
        first.base,
        _mean_probe([table.probe for table in tables], weights),
    )


def _mean_probe(probes: Sequence[Probe | None], weights: Sequence[float]) -> Probe | None:
    given = [probe for probe in probes if probe is not None]
    shapes = {(probe.layer, len(probe.weight)) for probe in given}
    if len(given) < len(probes) or len(shapes) != 1:
        return None
    shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    weight = torch.stack([probe.weight.double() for probe in given])
    bias = torch.tensor([probe.bias for probe in given], dtype=torch.float64)
    return Probe((shares @ weight).float(), float(shares @ bias), given[0].layer)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hex sha256 of a tokenizer's vocabulary: which id stands for which token."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    return hashlib.sha256(json.dumps(vocabulary, ensure_ascii=True).encode()).hexdigest()
