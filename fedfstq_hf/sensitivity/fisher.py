"""Fisher averages read off a backward pass: of the adapter's coordinates, and per token id at the input embeddings.

`AdapterFisher` is the diagonal that messages are weighted by, `TokenSensitivity` stage 1 of Fed-FSTQ. Fed-FSTQ couples
them in that the adapter's gradients are those of the (token-filtered) local objective. The paper indexes its token
table by position in the batch; here it is kept per token id, so that it lasts across batches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import AdapterMismatchError, ConfigError, DataError, NonFiniteError


class AdapterFisher:
    """`F <- rho F + (1 - rho) (dL/dtheta)^2` per coordinate, bias-corrected when read.

    Feed it the accumulated gradient of every local step, before clipping. Kept in float32 on the parameters' devices,
    updated in place by fused kernels; it costs one pass over the gradients.
    """

    def __init__(self, params: Sequence[Tensor], rho: float = 0.9) -> None:
        if not 0.0 <= rho < 1.0:
            raise ConfigError(f"rho is {rho!r}; expected 0 <= rho < 1 (the paper's is 0.9)")
        self.rho = rho
        self._ema = [torch.zeros_like(p, dtype=torch.float32, requires_grad=False) for p in params]
        self._steps = 0

    @torch.no_grad()
    def update(self, grads: Sequence[Tensor | None]) -> None:
        """Take in one step's gradients, in the order of `params`; None (parameter unused in this step) counts as zero.

        Raises NonFiniteError, and leaves the average as it was, if a gradient or its squared norm is not finite.
        """
        if len(grads) != len(self._ema):
            raise AdapterMismatchError(f"got {len(grads)} gradients; expected {len(self._ema)}, one per parameter")
        pairs = [(e, g.detach().float()) for e, g in zip(self._ema, grads, strict=True) if g is not None]
        given = [g for _, g in pairs]
        check_finite(given)
        self._steps += 1
        if self._ema:
            torch._foreach_mul_(self._ema, self.rho)
        if given:
            torch._foreach_addcmul_([e for e, _ in pairs], given, given, value=1.0 - self.rho)

    def reset(self) -> None:
        """Forget everything, in place."""
        if self._ema:
            torch._foreach_zero_(self._ema)
        self._steps = 0

    def vector(self) -> Tensor:
        """Flat float32 (sum of sizes,), bias-corrected, in the order of `params`; zeros before the first update."""
        correction = 1.0 / (1.0 - self.rho**self._steps) if self._steps else 0.0
        return self._flat() * correction

    def state_dict(self) -> dict[str, Tensor]:
        """{"ema": flat float32 before bias correction, "steps": int64 scalar}."""
        return {"ema": self._flat(), "steps": torch.tensor(self._steps)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore `state_dict()`. Raises AdapterMismatchError if it belongs to an adapter of another size."""
        size = sum(e.numel() for e in self._ema)
        if set(state) != {"ema", "steps"} or tuple(state["ema"].shape) != (size,):
            given = {key: tuple(value.shape) for key, value in state.items()}
            raise AdapterMismatchError(f"Fisher state has {given}; expected 'ema' of shape ({size},) and 'steps'")
        offset = 0
        for target in self._ema:
            target.copy_(state["ema"][offset : offset + target.numel()].view_as(target))
            offset += target.numel()
        self._steps = int(state["steps"])

    def _flat(self) -> Tensor:
        return torch.cat([e.reshape(-1) for e in self._ema]) if self._ema else torch.zeros(0)


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


@torch.no_grad()
def check_finite(grads: Sequence[Tensor]) -> None:
    """Raise NonFiniteError if a gradient, or the square of one's norm, is NaN or infinite."""
    if grads:
        norms = torch.stack([norm.to(grads[0].device) for norm in torch._foreach_norm(list(grads))])
        if not bool(torch.isfinite(norms.float().square().sum())):
            raise NonFiniteError("adapter gradients hold NaN or infinity; nothing was taken from them")


@torch.no_grad()
def second_moments(optimizer: Any, params: Sequence[Tensor]) -> Tensor:
    """Adam's `exp_avg_sq`, bias-corrected: a Fisher diagonal that costs nothing, of gradients as they were clipped.

    Returns:
        Flat float32 (sum of sizes,) in the order of `params`; zeros for one that is frozen or never had a gradient.

    Raises:
        ConfigError: the optimizer keeps no such average per coordinate.
    """
    betas = {id(p): group.get("betas") for group in optimizer.param_groups for p in group["params"]}
    parts = []
    for parameter in params:
        state, beta = optimizer.state.get(parameter, {}), betas.get(id(parameter))
        if not parameter.requires_grad or (beta is not None and not state):
            parts.append(torch.zeros(parameter.numel(), device=parameter.device))
        elif beta is not None and {"exp_avg_sq", "step"} <= set(state):
            correction = 1.0 - beta[1] ** float(state["step"])
            parts.append(state["exp_avg_sq"].float().reshape(-1) / correction)
        else:
            raise ConfigError(
                f"fisher='adam' reads Adam's second moments, and this optimizer keeps "
                f"{', '.join(map(str, state)) or 'none'}. Use optim='adamw_torch' or fisher='gradients'."
            )
    return torch.cat(parts) if parts else torch.zeros(0)
