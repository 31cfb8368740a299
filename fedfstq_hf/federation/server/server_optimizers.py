"""Server optimizers whose steps are the same bits on every processor: SGD as torch has it, FedAdam as its paper has it.

Torch's kernels multiply and add in one instruction, which rounds once, where the processor has it, and round twice
elsewhere. Here every product is rounded before it is added.

FedAdam: Reddi et al., "Adaptive Federated Optimization" (https://arxiv.org/abs/2003.00295), algorithm 2:
m_t = b1 m_{t-1} + (1 - b1) Δ_t, v_t = b2 v_{t-1} + (1 - b2) Δ_t^2, Θ_{t+1} = Θ_t + lr m_t / (sqrt(v_t) + tau).
`torch.optim.Adam` corrects the bias of both moments, which makes its first steps larger by up to 1 / sqrt(1 - b2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor


class SGD(torch.optim.SGD):
    """`torch.optim.SGD` with its options and its state; parameters in float32 on the CPU."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                gradient = -parameter.grad if group["maximize"] else parameter.grad
                if group["weight_decay"]:
                    gradient = gradient + parameter * group["weight_decay"]
                parameter.sub_(self._direction(gradient, group, self.state[parameter]) * group["lr"])

    @staticmethod
    def _direction(gradient: Tensor, group: dict[str, Any], state: dict[str, Any]) -> Tensor:
        """The gradient with momentum, which `state` keeps."""
        if not group["momentum"]:
            return gradient
        velocity = state.get("momentum_buffer")
        if velocity is None:
            velocity = state["momentum_buffer"] = gradient.clone()
        else:
            velocity.mul_(group["momentum"]).add_(gradient * (1 - group["dampening"]))
        return gradient + velocity * group["momentum"] if group["nesterov"] else velocity


class FedAdam(torch.optim.Optimizer):
    """Server optimizer; a gradient is a negative mean update. Parameters in float32 on the CPU.

    Args:
        params: as for any torch optimizer.
        lr: the server's step size; the paper tunes it together with `tau`.
        betas: decay of the two moments; the paper's are 0.9 and 0.99.
        tau: degree of adaptivity; the smaller, the more alike all coordinates' steps. The paper's default is 1e-3. The
            second moment starts at tau^2, the least that the paper's analysis allows.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.99),
        tau: float = 1e-3,
    ) -> None:
        first, second = betas
        if not lr > 0 or not tau > 0 or not 0 <= first < 1 or not 0 <= second < 1:
            raise ValueError(f"expected lr > 0, tau > 0 and two betas in [0, 1), got {lr}, {tau}, {list(betas)}")
        super().__init__(params, {"lr": lr, "betas": (first, second), "tau": tau})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of algorithm 2."""
        for group in self.param_groups:
            first, second = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state: dict[str, Any] = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                    state["variance"] = torch.full_like(parameter, group["tau"] ** 2)
                state["momentum"].mul_(first).add_(parameter.grad * (1 - first))
                state["variance"].mul_(second).add_(parameter.grad.square() * (1 - second))
                # numpy's root is rounded correctly, torch's is that of a library which differs between processors
                root = torch.from_numpy(np.sqrt(state["variance"].numpy()))
                parameter.sub_(state["momentum"] / root.add_(group["tau"]) * group["lr"])
