"""SCAFFOLD at the client (Karimireddy et al. 2020, https://arxiv.org/abs/1910.06378, algorithm 1).

Each local gradient g(y) becomes g(y) - c_i + c. The next c_i is option II of the paper, c_i - c + (x - y_K) / (K lr):
with the paper's plain SGD that *is* the mean of the gradients g(y_k) that local training met, before their correction.
That mean is what is taken here: it keeps its meaning under AdamW and clipping, where x - y_K is no sum of gradients.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedfstq_hf.adapter import AdapterView
from fedfstq_hf.errors import MailboxError
from fedfstq_hf.federation.scaffold import client_variate
from fedfstq_hf.trainer.methods.hooks import LocalMethod, RoundStart


class Scaffold(LocalMethod):
    """Adds c - c_i to an adapter's gradients, and keeps their mean over the round as they were before.

    Holds two vectors of the adapter's size on its device.
    """

    name = "scaffold"

    def __init__(self, view: AdapterView) -> None:
        self._view = view
        self._correction: list[Tensor] = []
        self._sum, self._steps = torch.zeros(view.schema.num_params), 0

    def begin(self, start: RoundStart) -> None:
        """Start a round with c and c_i.

        Raises:
            MailboxError: whoever handed out the round did not bring c.
        """
        if start.variate is None:
            raise MailboxError(
                "This federation has control variates (SCAFFOLD), and the round came without the server's."
            )
        num_params = self._view.schema.num_params
        self._correction = self._view.split(start.variate - client_variate(start.carried or {}, num_params))
        self._sum, self._steps = torch.zeros(num_params), 0

    @torch.no_grad()
    def backward(self) -> None:
        """Take the gradients as they stand, which have not been clipped, and correct them."""
        flat = torch.cat([gradient.detach().float().reshape(-1) for gradient in self._view.gradients()])
        self._sum, self._steps = self._sum.to(flat.device) + flat, self._steps + 1
        for parameter, part in zip(self._view.parameters, self._correction, strict=True):
            parameter.grad = part.clone() if parameter.grad is None else parameter.grad.add_(part)

    def end(self, steps: int) -> dict[str, Tensor]:
        """The next c_i."""
        return {"variate": (self._sum / max(self._steps, 1)).cpu()}

    def state_dict(self) -> dict[str, Tensor]:
        """The sum of the round's gradients so far, and their number."""
        return {"sum": self._sum, "steps": torch.tensor(self._steps)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a checkpoint."""
        self._sum, self._steps = state["sum"].clone(), int(state["steps"])
