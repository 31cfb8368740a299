"""A client's outbox: the message whose fate is not known yet, and what the messages before it left out.

An `Outbox` knows no file and no federation: who sends messages in another way than a session keeps `state_dict()`. A
session stores it with the rest of a client's state (`SessionState`): one file, so that it changes in one atomic step or
not at all.

The residual is what *accepted* messages left out. A message that was not used (late, refused, lost) leaves it as it
was: the next local training starts from a newer adapter and says again where this client's data pull. Were the unused
change kept as well, a client that is late twenty times would pull with the force of twenty.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fedfstq_hf.codec import SparseUpdate
from fedfstq_hf.errors import ConfigError, MailboxError

FORMAT = 4
STATE_FILE = "session.safetensors"
_CARRIED = "carried."

_RESIDUAL, _ROUND, _CORRECTED = "residual", "pending.round", "pending.corrected"
_MESSAGE, _READABLE, _REFINEMENT = "pending.message", "pending.readable", "pending.refinement"


@dataclass(frozen=True)
class ErrorFeedback:
    """Residual `r' = (delta + decay * r) - sent`. decay 1 forgets nothing, 0 switches error feedback off."""

    decay: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.decay <= 1.0:
            raise ConfigError(f"error feedback decay is {self.decay!r}; expected a number from 0 (off) to 1 (keep all)")

    def corrected(self, delta: Tensor, residual: Tensor | None) -> Tensor:
        """What to encode: `delta + decay * residual`, a new vector (num_params,). residual None: first round."""
        if residual is None or self.decay == 0.0:
            return delta.clone()
        return delta + self.decay * residual

    def after(self, corrected: Tensor, sent: SparseUpdate) -> Tensor:
        """Residual once `sent` was accepted: `corrected - sent`, a new vector (num_params,).

        If the update was refused or lost, the residual stays what it was before: the next `delta` replaces this one.
        """
        residual = corrected.clone()
        sent.add_to(residual, -1.0)
        return residual


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


@dataclass(frozen=True)
class SessionState:
    """A client between two rounds; `ClientSession` says what the fields mean."""

    outbox: Outbox
    last_round: int = -1
    settled_round: int = -1
    carried: Mapping[str, Tensor] = field(default_factory=dict)

    def to_bytes(self, identity: Mapping[str, Any]) -> bytes:
        """The file: tensors, and in its metadata the rounds and whose state it is."""
        tensors = {f"{_CARRIED}{name}": value.detach().cpu().contiguous() for name, value in self.carried.items()}
        fields = {**identity, "last_round": self.last_round, "settled_round": self.settled_round}
        return save(tensors | self.outbox.state_dict(), metadata={"fedfstq": json.dumps(fields, sort_keys=True)})

    @classmethod
    def read(cls, path: Path, identity: Mapping[str, Any], feedback: ErrorFeedback) -> SessionState:
        """Raises `MailboxError` if the file is damaged, or its identity another."""
        try:
            data = path.read_bytes()
            # Not safe_open: a Ctrl-C within it comes out as a TypeError, which would look like a damaged file.
            tensors = load(data)
            fields = json.loads(_metadata(data)["fedfstq"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise MailboxError(
                f"The client state {path} cannot be read ({error}). Restore it from a backup, or move it away to join "
                "as a new client: its residual is then lost."
            ) from error
        for key, value in identity.items():
            if fields.get(key) != value:
                raise MailboxError(
                    f"The client state {path} has {key} {fields.get(key)!r}, expected {value!r}: it belongs to another "
                    "client, federation, adapter or version. Give this client a state folder of its own (state_dir, or "
                    "another output_dir)."
                )
        carried = {name.removeprefix(_CARRIED): value for name, value in tensors.items() if name.startswith(_CARRIED)}
        outbox = Outbox(feedback).load_state_dict(tensors)
        return cls(outbox, fields["last_round"], fields["settled_round"], carried)


def _tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.numpy().tobytes()


def _metadata(data: bytes) -> dict[str, str]:
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return dict(header["__metadata__"])
