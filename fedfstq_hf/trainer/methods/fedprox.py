"""FedProx: a pull towards the adapter that the round started from (Li et al. 2020, https://arxiv.org/abs/1812.06127)."""

from __future__ import annotations

import torch
from torch import Tensor

from fedfstq_hf.adapter import AdapterView
from fedfstq_hf.trainer.methods.hooks import LocalMethod, RoundStart


class FedProx(LocalMethod):
    """Adds `mu * (theta - theta_t)`, the gradient of `mu / 2 * ||theta - theta_t||^2`, to an adapter's gradients.

    Holds one copy of the adapter on its device.
    """

    name = "fedprox"

    def __init__(self, view: AdapterView, mu: float) -> None:
        self._view, self._mu = view, mu
        self._anchor: list[Tensor] = []

    def begin(self, start: RoundStart) -> None:
        """Keep theta_t."""
        self._anchor = self._view.split(start.adapter)

    @torch.no_grad()
    def backward(self) -> None:
        """Add the pull to the gradients as they stand, which have not been clipped."""
        for parameter, anchor in zip(self._view.parameters, self._anchor, strict=True):
            pull = (parameter - anchor).mul_(self._mu)
            parameter.grad = pull if parameter.grad is None else parameter.grad.add_(pull)
