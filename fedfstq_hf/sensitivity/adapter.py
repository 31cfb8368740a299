"""Diagonal empirical Fisher of the adapter: a moving average of squared gradients.

Fed-FSTQ's token-to-parameter coupling: the gradients are those of the (token-filtered) local objective.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import AdapterMismatchError, ConfigError, NonFiniteError


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
