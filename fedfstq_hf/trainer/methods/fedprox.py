"""FedProx: a pull towards the adapter that the round started from (Li et al. 2020, https://arxiv.org/abs/1812.06127)."""

from __future__ import annotations

import torch
from torch import Tensor

from fedfstq_hf.adapter import AdapterView


class Proximal:
    """Adds `mu * (theta - theta_t)`, the gradient of `mu / 2 * ||theta - theta_t||^2`, to an adapter's gradients.

    Holds one copy of the adapter on its device.
    """

    def __init__(self, view: AdapterView, mu: float) -> None:
        self._view, self._mu = view, mu
        self._start: Tensor | None = None
        self._anchor: list[Tensor] = []

    @torch.no_grad()
    def add(self, start: Tensor) -> None:
        """Add it to the gradients as they stand, which must not have been clipped.

        Args:
            start: theta_t, (num_params,) float32; the same tensor all through a round.
        """
        view = self._view
        if start is not self._start:
            parts = (start[spec.offset : spec.offset + spec.size] for spec in view.schema.tensors)
            self._anchor = [
                part.view(parameter.shape).to(parameter.device, copy=True)
                for part, parameter in zip(parts, view.parameters, strict=True)
            ]
            self._start = start
        for parameter, anchor in zip(view.parameters, self._anchor, strict=True):
            pull = (parameter - anchor).mul_(self._mu)
            parameter.grad = pull if parameter.grad is None else parameter.grad.add_(pull)
