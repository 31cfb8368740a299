"""What a client's state file holds: one file, so that it changes in one atomic step or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fedfstq_hf.codec import ErrorFeedback
from fedfstq_hf.errors import MailboxError
from fedfstq_hf.federation.client.outbox import Outbox

FORMAT = 4
STATE_FILE = "session.safetensors"
_CARRIED = "carried."


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


def _metadata(data: bytes) -> dict[str, str]:
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return dict(header["__metadata__"])
