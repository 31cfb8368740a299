"""A client's outbox: the message whose fate is not known yet, and what the messages before it left out.

It knows no file and no federation. A session stores it with the rest of a client's state; who sends messages in another
way keeps `state_dict()`.

The residual is what *accepted* messages left out. A message that was not used (late, refused, lost) leaves it as it
was: the next local training starts from a newer adapter and says again where this client's data pull. Were the unused
change kept as well, a client that is late twenty times would pull with the force of twenty.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedfstq_hf.codec import ErrorFeedback, SparseUpdate

_RESIDUAL, _ROUND, _CORRECTED = "residual", "pending.round", "pending.corrected"
_MESSAGE, _READABLE, _REFINEMENT = "pending.message", "pending.readable", "pending.refinement"


@dataclass(frozen=True)
class Pending:
    """A message whose fate is unknown.

    `message` is what travels, `readable` the same before it was sealed; `corrected` is Δ plus residual, (num_params,)
    float32; `refinement` is what follows the message, where the federation has refinements.
    """

    round: int
    message: bytes
    corrected: Tensor
    readable: bytes
    refinement: bytes | None = None

    @property
    def sha256(self) -> str:
        """Hex digest that the round record names it by."""
        return hashlib.sha256(self.message).hexdigest()


@dataclass(frozen=True)
class Outbox:
    """Idle, or with one message pending; a change makes a new outbox, so that it can be stored before it is used.

    Attributes:
        feedback: what of a residual is sent with the next update.
        residual: what is owed of accepted messages, (num_params,) float32; None stands for zeros. A pending message
            has no part in it yet.
        pending: the message that was packed last, until its fate is known.
    """

    feedback: ErrorFeedback
    residual: Tensor | None = None
    pending: Pending | None = None

    def corrected(self, delta: Tensor) -> Tensor:
        """What the next message should say: `delta` and what is owed, (num_params,) float32."""
        return self.feedback.corrected(delta, self.residual)

    def with_pending(self, pending: Pending) -> Outbox:
        """The outbox with a message in it."""
        return replace(self, pending=pending)

    def settled(self, sent: SparseUpdate | None) -> Outbox:
        """The outbox once the message's fate is known.

        Args:
            sent: what the message decodes to, if it was accepted; None if it was not used.
        """
        if self.pending is None or sent is None:
            return replace(self, pending=None)
        residual = self.feedback.after(self.pending.corrected, sent)
        keeps = self.feedback.decay > 0 and bool(residual.any())  # a lossless codec leaves nothing to keep
        return replace(self, residual=residual if keeps else None, pending=None)

    def state_dict(self) -> dict[str, Tensor]:
        """All of it but `feedback`, as tensors."""
        state, pending = {}, self.pending
        if self.residual is not None:
            state[_RESIDUAL] = self.residual
        if pending is not None:
            state[_ROUND] = torch.tensor(pending.round)
            state[_MESSAGE] = _tensor(pending.message)
            state[_CORRECTED] = pending.corrected
            if pending.readable != pending.message:
                state[_READABLE] = _tensor(pending.readable)
            if pending.refinement is not None:
                state[_REFINEMENT] = _tensor(pending.refinement)
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> Outbox:
        """The outbox that gave the state; other tensors in it are left alone. Raises `KeyError` if some are missing."""
        pending = None
        if _ROUND in state:
            sent = _bytes(state[_MESSAGE])
            readable = _bytes(state[_READABLE]) if _READABLE in state else sent
            second = _bytes(state[_REFINEMENT]) if _REFINEMENT in state else None
            pending = Pending(int(state[_ROUND]), sent, state[_CORRECTED], readable, second)
        return Outbox(self.feedback, state.get(_RESIDUAL), pending)


def _tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.numpy().tobytes()
