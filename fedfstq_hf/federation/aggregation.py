"""The weighted mean of sparse updates, and a server optimizer on it as a pseudo-gradient.

Θ_{t+1} = ServerOptimizer(Θ_t, -Σ_k w_k Δ_k), w_k = N_k / Σ_j N_j over the updates that arrived (METHOD section 1,
step 4; Reddi et al., "Adaptive Federated Optimization", for the pseudo-gradient).

Server optimizers whose steps are the same bits on every processor: SGD as torch has it, FedAdam as its paper has it.

Torch's kernels multiply and add in one instruction, which rounds once, where the processor has it, and round twice
elsewhere. Here every product is rounded before it is added.

FedAdam: Reddi et al., "Adaptive Federated Optimization" (https://arxiv.org/abs/2003.00295), algorithm 2:
m_t = b1 m_{t-1} + (1 - b1) Δ_t, v_t = b2 v_{t-1} + (1 - b2) Δ_t^2, Θ_{t+1} = Θ_t + lr m_t / (sqrt(v_t) + tau).
`torch.optim.Adam` corrects the bias of both moments, which makes its first steps larger by up to 1 / sqrt(1 - b2).

How long an update may be: one client's influence on a round is bounded, also where most messages say nothing.

The bound is a multiple of the round's median length. Empty messages are ordinary (a slow link, a tiny budget), and
where most are empty the median is 0 and says nothing about the others. Then the lengths of those that say something
count, together with what the round before used; as even these may be few, no update may be longer than the adapter.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from fedfstq_hf.codec import SparseUpdate
from fedfstq_hf.errors import ConfigError, MailboxError
from fedfstq_hf.federation.record import RoundRecord
from fedfstq_hf.text import unknown


class WeightedMean:
    """A streaming mean in float64: one update in memory at a time, work proportional to its non-zeros.

    The result depends on the order of `add`; callers add in client-id order.
    """

    def __init__(self, num_params: int) -> None:
        self._sum = torch.zeros(num_params, dtype=torch.float64)
        self.total_weight = 0.0

    def add(self, update: SparseUpdate, weight: float, scale: float = 1.0) -> None:
        """Add one client's update, multiplied by `scale`, with its weight (its number of examples)."""
        update.add_to(self._sum, weight * scale)
        self.total_weight += weight

    def result(self) -> Tensor:
        """The mean, (num_params,) float32."""
        if self.total_weight == 0:
            raise ValueError("No update was added: there is no mean of nothing.")
        return (self._sum / self.total_weight).to(torch.float32)


def check_server(server: Mapping[str, Any]) -> None:
    """Raise `ConfigError` unless `server` names an optimizer that takes the options and steps on a vector."""
    try:
        for progress in (0.0, 1.0):
            server_step(torch.zeros(2), torch.ones(2), server, None, progress)
    except (TypeError, RuntimeError) as error:  # LBFGS wants a closure, SparseAdam sparse gradients
        raise ConfigError(
            f"{server.get('optimizer')} cannot take a step on the mean update: {error}. "
            "Choose another server.optimizer, such as SGD or Adam."
        ) from error


def server_step(
    adapter: Tensor, mean_update: Tensor, server: Mapping[str, Any], state: bytes | None, progress: float = 0.0
) -> tuple[Tensor, bytes]:
    """One step of the server optimizer.

    With SGD and FedAdam it is the same bits on every processor. Other classes of `torch.optim` are the same on the same
    kind of processor: their kernels round otherwise where it multiplies and adds in one instruction.

    Args:
        adapter: Θ_t, (num_params,) float32; not changed.
        mean_update: Σ_k w_k Δ_k, (num_params,) float32.
        server: `{"optimizer": "SGD", "lr": 1.0, ...}`; with `final_lr` the rate goes from `lr` in the first round to
            that in the last, in equal steps.
        state: what the previous round's call returned, None in the first round.
        progress: 0 in the first round, 1 in the last.

    Returns:
        The change Θ_{t+1} - Θ_t, (num_params,) float32, and the optimizer's state as a safetensors file.
    """
    parameter = torch.nn.Parameter(adapter.clone())
    optimizer = _build(server, parameter, progress)
    if state:
        try:
            restored = load(state)
        except Exception as error:
            raise MailboxError(f"The server optimizer's state in the mailbox cannot be read: {error}") from error
        if restored:
            optimizer.state[parameter] = dict(restored)
    parameter.grad = -mean_update
    optimizer.step()
    tensors = {name: value for name, value in optimizer.state[parameter].items() if isinstance(value, Tensor)}
    return parameter.detach() - adapter, save(tensors)


def keeps_state(state: bytes | None) -> bool:
    """Whether a server optimizer's next step depends on earlier ones, as its state after a step shows."""
    return state is not None and bool(load(state))


def _build(server: Mapping[str, Any], parameter: Tensor, progress: float) -> torch.optim.Optimizer:
    options = dict(server)
    name = options.pop("optimizer", "SGD")
    known = {
        key: value
        for key, value in {**vars(torch.optim), "FedAdam": FedAdam, "SGD": SGD}.items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
    }
    if name not in known:
        raise ConfigError(unknown("server.optimizer", name, sorted(known)))
    options.setdefault("lr", 1.0)
    final = options.pop("final_lr", None)
    try:
        if final is not None:
            options["lr"] += progress * (final - options["lr"])
        return known[name]([parameter], **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name} refuses the server options {options}: {error}") from error


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


@dataclass(frozen=True)
class UsualNorm:
    """What lengths are compared with where most messages of a round say nothing.

    Attributes:
        lengths: L2 norms that the round before used, as they were clipped.
        adapter: L2 norm of the adapter; 0 for none to compare with.
    """

    lengths: tuple[float, ...] = ()
    adapter: float = 0.0

    @classmethod
    def of(cls, record: RoundRecord, adapter: Tensor) -> UsualNorm:
        """From the record that opened the round, and a published adapter, (num_params,) float32."""
        lengths = tuple(update.scale * update.norm for update in record.accepted)
        return cls(lengths, SparseUpdate(adapter.numel(), None, adapter).norm())


def longest_norm(norms: Sequence[float], clip: float | None, usual: Callable[[], UsualNorm] = UsualNorm) -> float:
    """The L2 norm above which an update is scaled down to it; infinite for no bound.

    Args:
        norms: of the round's updates, at least 0.
        clip: the spec's; None clips nothing.
        usual: asked only where most of the norms are 0.

    Returns:
        `clip` times the lower median of the norms. Where that is 0: `clip` times the lower median of those above 0 and
        of the usual ones, and no more than the adapter's norm. 0 where a single update says anything and there is
        nothing at all to compare it with.
    """
    if clip is None or not any(norms):
        return math.inf
    middle = statistics.median_low(norms)
    if middle > 0:
        return clip * middle
    known = usual()
    lengths = [norm for norm in (*norms, *known.lengths) if norm > 0]
    if known.adapter > 0:
        return min(clip * statistics.median_low(lengths), known.adapter)
    return clip * statistics.median_low(lengths) if len(lengths) > 1 else 0.0


def clip_scale(norm: float, longest: float) -> float:
    """What an update of that norm is multiplied with."""
    return 1.0 if norm <= longest else longest / norm
