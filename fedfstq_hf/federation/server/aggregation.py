"""The weighted mean of sparse updates, and a server optimizer on it as a pseudo-gradient.

Θ_{t+1} = ServerOptimizer(Θ_t, -Σ_k w_k Δ_k), w_k = N_k / Σ_j N_j over the updates that arrived (METHOD section 1,
step 4; Reddi et al., "Adaptive Federated Optimization", for the pseudo-gradient).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from fedfstq_hf.codec import SparseUpdate
from fedfstq_hf.errors import ConfigError, MailboxError
from fedfstq_hf.federation.server.server_optimizers import SGD, FedAdam
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
