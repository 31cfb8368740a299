"""The record of a round: which updates made the published adapter, and which were refused and why."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from fedfstq_hf.errors import MailboxError

FORMAT = 1


@dataclass(frozen=True)
class AcceptedUpdate:
    """One client's share of a round. `weight` is N_k / sum of N_j; `norm` the L2 norm of the decoded update."""

    client_id: str
    sha256: str
    num_bytes: int
    num_examples: int
    weight: float
    norm: float


@dataclass(frozen=True)
class RefusedUpdate:
    """An update that was not used, with the reason in words. `sha256` is empty where it was too large to be read."""

    client_id: str
    sha256: str
    num_bytes: int
    reason: str


@dataclass(frozen=True)
class RoundRecord:
    """What was published as round `round`: the adapter Θ_round and the updates it was made from.

    Attributes:
        round: 0 for the initial adapter; `r` for the adapter after `r` aggregations.
        adapter_sha256: of the published `adapter_model.safetensors`; the base that updates of this round name.
        adapter_bytes: its size in bytes.
        update_bytes: size of the packed change from the previous round, None where it was not published.
        opened_at, deadline: seconds since the epoch by the coordinator's clock; no deadline when None.
        finished: True on the last round: no more updates are wanted.
    """

    round: int
    adapter_sha256: str
    adapter_bytes: int
    schema: str
    opened_at: float
    deadline: float | None
    finished: bool
    update_bytes: int | None = None
    accepted: tuple[AcceptedUpdate, ...] = ()
    refused: tuple[RefusedUpdate, ...] = ()
    format: int = field(default=FORMAT)

    @property
    def updates(self) -> tuple[AcceptedUpdate | RefusedUpdate, ...]:
        """All updates that arrived in time, accepted ones first."""
        return (*self.accepted, *self.refused)

    @property
    def uplink_bytes(self) -> int:
        """Bytes that arrived for this round from all clients together, refused ones included."""
        return sum(update.num_bytes for update in self.updates)

    def fate(self, client_id: str, sha256: str) -> AcceptedUpdate | RefusedUpdate | None:
        """What became of a client's message; None when the record does not name it (late or lost)."""
        for update in self.updates:
            if update.client_id == client_id and update.sha256 in (sha256, ""):
                return update
        return None

    def to_json(self) -> bytes:
        """Readable JSON with sorted keys."""
        return (json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes) -> RoundRecord:
        """Parse `round.json`.

        Raises:
            MailboxError: not a round record of this format.
        """
        try:
            fields: dict[str, Any] = json.loads(data)
            if fields.get("format") != FORMAT:
                raise MailboxError(
                    f"The round record has format {fields.get('format')!r}; this version reads format {FORMAT}. "
                    "Install the fedfstq_hf version that the federation's coordinator runs."
                )
            fields["accepted"] = tuple(AcceptedUpdate(**entry) for entry in fields["accepted"])
            fields["refused"] = tuple(RefusedUpdate(**entry) for entry in fields["refused"])
            return cls(**fields)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise MailboxError(f"The mailbox's round record cannot be read: {error}") from error
