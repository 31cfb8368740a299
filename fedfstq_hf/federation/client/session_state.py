"""What a client's state file holds: one file, so that it changes in one atomic step or not at all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fedfstq_hf.errors import MailboxError

FORMAT = 3
STATE_FILE = "session.safetensors"
_CARRIED = "carried."


@dataclass(frozen=True)
class Pending:
    """A stored message whose fate is unknown.

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
class SessionState:
    """A client between two rounds; `ClientSession` says what the fields mean."""

    last_round: int = -1
    settled_round: int = -1
    residual: Tensor | None = None
    carried: Mapping[str, Tensor] = field(default_factory=dict)
    pending: Pending | None = None

    def to_bytes(self, identity: Mapping[str, Any]) -> bytes:
        """The file: tensors, and in its metadata the rounds and whose state it is."""
        tensors = {f"{_CARRIED}{name}": value.detach().cpu().contiguous() for name, value in self.carried.items()}
        if self.residual is not None:
            tensors["residual"] = self.residual
        pending = self.pending
        fields: dict[str, Any] = {
            **identity,
            "last_round": self.last_round,
            "settled_round": self.settled_round,
            "pending_round": None if pending is None else pending.round,
        }
        if pending is not None:
            tensors["pending.message"] = _tensor(pending.message)
            tensors["pending.corrected"] = pending.corrected
            if pending.readable != pending.message:
                tensors["pending.readable"] = _tensor(pending.readable)
            if pending.refinement is not None:
                tensors["pending.refinement"] = _tensor(pending.refinement)
        return save(tensors, metadata={"fedfstq": json.dumps(fields, sort_keys=True)})

    @classmethod
    def read(cls, path: Path, identity: Mapping[str, Any]) -> SessionState:
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
        pending: Pending | None = None
        if fields["pending_round"] is not None:
            sent = _bytes(tensors["pending.message"])
            readable = _bytes(tensors["pending.readable"]) if "pending.readable" in tensors else sent
            second = _bytes(tensors["pending.refinement"]) if "pending.refinement" in tensors else None
            pending = Pending(fields["pending_round"], sent, tensors["pending.corrected"], readable, second)
        carried = {name.removeprefix(_CARRIED): value for name, value in tensors.items() if name.startswith(_CARRIED)}
        return cls(fields["last_round"], fields["settled_round"], tensors.get("residual"), carried, pending)


def _metadata(data: bytes) -> dict[str, str]:
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return dict(header["__metadata__"])


def _tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.numpy().tobytes()
