"""SCAFFOLD at the client (Karimireddy et al. 2020, https://arxiv.org/abs/1910.06378, algorithm 1).

Each local gradient g(y) becomes g(y) - c_i + c. The next c_i is option II of the paper, c_i - c + (x - y_K) / (K lr):
with the paper's plain SGD that *is* the mean of the gradients g(y_k) that local training met, before their correction.
That mean is what is taken here: it keeps its meaning under AdamW and clipping, where x - y_K is no sum of gradients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedfstq_hf.adapter import AdapterView
from fedfstq_hf.errors import MailboxError


class MeanGradient:
    """The mean of a round's gradients, one per optimizer step, in float32 on their device."""

    def __init__(self, num_params: int) -> None:
        self._num_params = num_params
        self.reset()

    def reset(self) -> None:
        """Forget all."""
        self._sum, self._steps = torch.zeros(self._num_params), 0

    @torch.no_grad()
    def update(self, gradients: Sequence[Tensor]) -> None:
        """Add one step's, in schema order."""
        flat = torch.cat([gradient.detach().float().reshape(-1) for gradient in gradients])
        self._sum, self._steps = self._sum.to(flat.device) + flat, self._steps + 1

    def vector(self) -> Tensor:
        """(num_params,) float32 on the CPU; zeros before the first step."""
        return (self._sum / max(self._steps, 1)).cpu()

    def state_dict(self) -> dict[str, Tensor]:
        """For a checkpoint within a round."""
        return {"sum": self._sum, "steps": torch.tensor(self._steps)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a checkpoint."""
        self._sum, self._steps = state["sum"].clone(), int(state["steps"])


class Correction:
    """Adds c - c_i to an adapter's gradients. Holds one copy of the adapter's size on its device."""

    def __init__(self, view: AdapterView) -> None:
        self._view = view
        self._parts: list[Tensor] = []

    def begin(self, server: Tensor | None, client: Tensor) -> None:
        """Start a round with c and c_i, both (num_params,) float32.

        Raises:
            MailboxError: whoever handed out the round did not bring c.
        """
        if server is None:
            raise MailboxError(
                "This federation has control variates (SCAFFOLD), and the round came without the server's."
            )
        difference = server - client
        self._parts = [
            difference[spec.offset : spec.offset + spec.size].view(parameter.shape).to(parameter.device)
            for spec, parameter in zip(self._view.schema.tensors, self._view.parameters, strict=True)
        ]

    @torch.no_grad()
    def add(self) -> None:
        """Add it to the gradients as they stand, which must not have been clipped."""
        for parameter, part in zip(self._view.parameters, self._parts, strict=True):
            parameter.grad = part.clone() if parameter.grad is None else parameter.grad.add_(part)
