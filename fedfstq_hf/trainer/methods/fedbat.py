"""FedBAT's local training: the update is learned in binary form (Li et al. 2024, https://arxiv.org/abs/2408.03215).

After a warm-up in full precision the forward pass sees Θ_t + S(m, alpha), where m is the update that the optimizer
moves and S rounds each of its coordinates stochastically to plus or minus a step size per tensor:

    S(m, alpha) = +alpha with probability clip((m / alpha + 1) / 2, 0, 1), else -alpha
    dS/dm       = 1 where |m| <= alpha, else 0
    dS/dalpha   = sign(m) where |m| > alpha, else (S - m) / alpha

Step sizes are learned as alpha = alpha_0 exp(rho a), from alpha_0 = mean |m| at the end of the warm-up and a = 0. What
is sent is S(m, alpha), which codec `fedbat` carries exactly. Ours: one draw serves all micro-batches of an optimizer
step, so that 1 x 16 and 4 x 4 are the same; step sizes have no absolute bounds, as the authors' code has for its nets.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from fedfstq_hf.adapter import AdapterView
from fedfstq_hf.trainer.methods.hooks import LocalMethod, MicroBatch, RoundStart


def binarise(update: Tensor, alpha: Tensor, draws: Tensor) -> Tensor:
    """S(m, alpha), of the shape of `update`.

    Args:
        update: m.
        alpha: step size, one number of at least 0.
        draws: uniform in [0, 1), of the same shape.
    """
    share = torch.where(alpha > 0, update / alpha, torch.zeros_like(update))
    return torch.where(draws < (share + 1) / 2, alpha, -alpha)


def binarise_backward(gradient: Tensor, update: Tensor, binary: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients with respect to m and alpha from that with respect to S; the second is one number.

    Args:
        gradient: dL/dS.
        update: m.
        binary: S as drawn.
        alpha: step size.
    """
    inside = update.abs() <= alpha
    slope = torch.where(inside, torch.where(alpha > 0, (binary - update) / alpha, 0.0), update.sign())
    return gradient * inside, (gradient * slope).sum()


class FedBAT(LocalMethod):
    """Trains one adapter's update in binary form. The adapter's parameters hold Θ_t + m between steps.

    Args:
        view: of the adapter.
        warmup: share of the local steps in full precision; at least one step is.
        rho: how fast step sizes are learned.
        local_steps: of a round.

    Attributes:
        exponents: a, (tensors,), which the optimizer moves beside the adapter.
    """

    name = "fedbat"

    def __init__(self, view: AdapterView, *, warmup: float, rho: float, local_steps: int) -> None:
        self._view, self._rho = view, rho
        self._warmup_steps = max(1, int(warmup * local_steps))
        device = view.parameters[0].device
        self.exponents = nn.Parameter(torch.zeros(len(view.parameters), device=device))
        self.parameters = [self.exponents]
        self._start: list[Tensor] = []
        self._first_alphas: Tensor | None = None
        self._full: list[Tensor] = []
        self._binary: list[Tensor] = []
        self._alphas = torch.zeros(0)
        self._seed = 0

    @torch.no_grad()
    def begin(self, start: RoundStart) -> None:
        """Start a round from Θ_t, with alpha_0 still to be measured."""
        self._start = self._view.split(start.adapter)
        self._seed, self._first_alphas, self._full = start.seed, None, []
        self.exponents.zero_()
        self.exponents.grad = None

    @contextlib.contextmanager
    def forward(self, batch: MicroBatch) -> Iterator[None]:
        """After the warm-up the model sees S(m, alpha) in the place of m, in all micro-batches of a step."""
        if batch.step >= self._warmup_steps and not self._full:
            self._enter(batch.step)
        yield
        if batch.last and self._full:
            self._leave()

    @torch.no_grad()
    def _enter(self, local_step: int) -> None:
        """Put S(m, alpha) in the place of m."""
        updates = self._updates()
        self._alphas = self._step_sizes(updates)
        self._binary = self._draw(updates, self._alphas, local_step)
        self._full = [parameter.detach().clone() for parameter in self._view.parameters]
        for parameter, start, binary in zip(self._view.parameters, self._start, self._binary, strict=True):
            parameter.copy_(start + binary)

    @torch.no_grad()
    def _leave(self) -> None:
        """Put m back, and turn gradients into those of m and the step sizes."""
        slopes = torch.zeros_like(self.exponents)
        for index, (parameter, full) in enumerate(zip(self._view.parameters, self._full, strict=True)):
            parameter.copy_(full)
            if parameter.grad is not None:
                update, alpha = full - self._start[index], self._alphas[index]
                parameter.grad, slopes[index] = binarise_backward(parameter.grad, update, self._binary[index], alpha)
        self.exponents.grad = slopes * self._alphas * self._rho
        self._full = []

    @torch.no_grad()
    def end(self, steps: int) -> dict[str, Tensor]:
        """What is sent: S(m, alpha)."""
        updates = self._updates()
        binary = self._draw(updates, self._step_sizes(updates), steps)
        return {"delta": torch.cat([part.reshape(-1) for part in binary]).cpu()}

    def state_dict(self) -> dict[str, Tensor]:
        """a, and alpha_0 once the warm-up is over."""
        state = {"exponents": self.exponents.detach().clone()}
        return state if self._first_alphas is None else {**state, "first_alphas": self._first_alphas}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a checkpoint, after `begin`."""
        self.exponents.copy_(state["exponents"])
        first = state.get("first_alphas")
        self._first_alphas = None if first is None else first.to(self.exponents.device)

    def _updates(self) -> list[Tensor]:
        pairs = zip(self._view.parameters, self._start, strict=True)
        return [parameter.detach() - start for parameter, start in pairs]

    def _step_sizes(self, updates: list[Tensor]) -> Tensor:
        if self._first_alphas is None:
            self._first_alphas = torch.stack([update.abs().mean() for update in updates])
        return self._first_alphas * (self._rho * self.exponents.detach()).exp()

    def _draw(self, updates: list[Tensor], alphas: Tensor, step: int) -> list[Tensor]:
        digest = hashlib.sha256(f"binarisation/{self._seed}/{step}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        draws = [torch.rand(update.shape, generator=generator).to(update.device) for update in updates]
        return [binarise(*one) for one in zip(updates, alphas, draws, strict=True)]
