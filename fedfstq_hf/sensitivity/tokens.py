"""Token sensitivity: how strongly the loss reacts to each token id (Fed-FSTQ stage 1).

The paper indexes its table by position in the batch; here it is kept per token id, so that it lasts across batches.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import AdapterMismatchError, ConfigError, DataError, NonFiniteError


class TokenSensitivity:
    """Bias-corrected moving average, per token id, of the mean `g(i) = ||dL/de_i||^2` of that id's occurrences.

    L is the sum of the loss over target tokens, not their mean: g(i) is then a figure of the token's own example, the
    same whatever else is in the batch, in the accumulation window and in other processes. Longer answers weigh more.

    `S <- rho S + (1 - rho) g` for the ids of a batch, others stay as they are. Higher is more sensitive. The table
    lives on the CPU in float64: the same gradients give the same scores on every machine.
    """

    def __init__(self, vocab_size: int, rho: float = 0.9) -> None:
        if vocab_size < 1:
            raise ConfigError(f"vocab_size is {vocab_size}; expected at least 1")
        if not 0.0 <= rho < 1.0:
            raise ConfigError(f"rho is {rho!r}; expected 0 <= rho < 1 (the paper's is 0.9)")
        self.vocab_size = vocab_size
        self.rho = rho
        self._ema = torch.zeros(vocab_size, dtype=torch.float64)
        self._count = torch.zeros(vocab_size, dtype=torch.int64)

    def update(self, input_ids: Tensor, g: Tensor, mask: Tensor | None = None) -> None:
        """Take in one refresh step.

        input_ids: (B, T) int64, or of any other shape. g: as input_ids, squared gradient norms at the input embeddings,
        >= 0. mask: as input_ids, true where a position counts (None: all). Raises NonFiniteError on NaN or infinity,
        DataError on unknown ids.
        """
        if input_ids.shape != g.shape or (mask is not None and mask.shape != g.shape):
            shapes = [tuple(t.shape) for t in (input_ids, g) if t is not None]
            raise DataError(f"input_ids and g have shapes {shapes}; expected the same (B, T), as for mask")
        ids = input_ids.detach().cpu().reshape(-1)
        values = g.detach().cpu().double().reshape(-1)
        if mask is not None:
            keep = mask.detach().cpu().reshape(-1).bool()
            ids, values = ids[keep], values[keep]
        if not ids.numel():
            return
        if int(ids.min()) < 0 or int(ids.max()) >= self.vocab_size:
            raise DataError(f"token ids span {int(ids.min())} .. {int(ids.max())}; expected 0 .. {self.vocab_size - 1}")
        if not bool(torch.isfinite(values).all()):
            raise NonFiniteError("token gradients hold NaN or infinity; the sensitivity table was left as it was")
        seen, place, occurrences = torch.unique(ids, return_inverse=True, return_counts=True)
        mean = torch.zeros(len(seen), dtype=torch.float64).index_add_(0, place, values) / occurrences
        self._ema[seen] = self.rho * self._ema[seen] + (1.0 - self.rho) * mean
        self._count[seen] += 1

    def scores(self) -> Tensor:
        """(vocab_size,) float32; +inf for ids never seen: rare tokens must not be the ones that are dropped."""
        return self.scores_of(torch.arange(self.vocab_size))

    def scores_of(self, ids: Tensor) -> Tensor:
        """Scores of some ids, in the shape of `ids` (int64, CPU), without computing the whole table's."""
        count = self._count[ids]
        corrected = self._ema[ids] / (1.0 - self.rho ** count.double())
        return torch.where(count > 0, corrected, torch.inf).float()

    def top(self, k: int) -> Tensor:
        """Ids (at most k, int64) of the most sensitive tokens *seen so far*, highest first, ties to the lower id."""
        scores = torch.where(self._count > 0, self.scores(), -torch.inf)
        order = torch.argsort(scores, descending=True, stable=True)
        return order[: min(k, int((self._count > 0).sum()))]

    def state_dict(self) -> dict[str, Tensor]:
        """{"ema": (vocab_size,) float64 before bias correction, "count": (vocab_size,) int64 refreshes per id}."""
        return {"ema": self._ema.clone(), "count": self._count.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore `state_dict()`. Raises AdapterMismatchError if it belongs to another vocabulary."""
        given = {key: tuple(value.shape) for key, value in state.items()}
        if given != dict.fromkeys(("ema", "count"), (self.vocab_size,)):
            raise AdapterMismatchError(
                f"token sensitivity state has {given}; expected 'ema' and 'count' of shape ({self.vocab_size},)"
            )
        self._ema = state["ema"].detach().cpu().double().clone()
        self._count = state["count"].detach().cpu().long().clone()
