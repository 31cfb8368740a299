"""Where a method can reach into a client's local training: a base class whose hooks do nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class RoundStart:
    """What local training begins with.

    Attributes:
        adapter: Θ_t, (num_params,) float32; the adapter's parameters may not hold it yet.
        seed: of everything that is drawn.
        carried: what the client kept of its last round; None where training goes on without a federation.
        variate: the server's control variate, (num_params,) float32, in a federation with SCAFFOLD.
    """

    adapter: Tensor
    seed: int
    carried: Mapping[str, Tensor] | None = None
    variate: Tensor | None = None


@dataclass(frozen=True)
class MicroBatch:
    """One forward and backward pass.

    Attributes:
        inputs: of the model.
        step: local step, from 0.
        last: whether the optimizer's step comes after it.
    """

    inputs: Mapping[str, Any] = field(repr=False)
    step: int
    last: bool


class LocalMethod:
    """One method's part in local training. Subclasses override the hooks that they need.

    They are called in this order: `begin`; for every optimizer step `forward` around each of its micro-batches, then,
    unless the gradients were NaN or infinite, `backward`; and after the last step `end`.

    Attributes:
        name: prefixes the method's state in checkpoints.
        parameters: learned beside the adapter; they go into the optimizer, without weight decay.
    """

    name = ""
    parameters: Sequence[nn.Parameter] = ()

    def begin(self, start: RoundStart) -> None:
        """A round starts, or local training without a federation."""

    def forward(self, batch: MicroBatch) -> contextlib.AbstractContextManager[None]:
        """Within it run forward and backward pass of a micro-batch. What gradients are left is what Fisher is of."""
        return contextlib.nullcontext()

    def backward(self) -> None:
        """All gradients of the step are there, unclipped, and Fisher information has been read off them."""

    def end(self, steps: int) -> dict[str, Tensor]:
        """After the round's last of `steps` steps: fields of the `LocalResult`, (num_params,) float32 on the CPU."""
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """For a checkpoint within a round."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a checkpoint, after `begin`."""
