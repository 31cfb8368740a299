"""The mailbox protocol: where published rounds lie and clients' messages arrive. A mailbox never decodes a message.

A mailbox holds immutable rounds (`round.json`, the adapter, ...) that only the coordinator publishes, and for each
round at most one message per client.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from fedfstq_hf.errors import MailboxError

ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG_FILE = "adapter_config.json"
RECORD_FILE = "round.json"
SPEC_FILE = "spec.json"
UPDATE_FILE = "update.safetensors"
SERVER_STATE_FILE = "server_optimizer.safetensors"


@dataclass(frozen=True, order=True)
class UpdateRef:
    """A message that lies in the mailbox: who sent it for which round, and how many bytes it has."""

    client_id: str
    round: int
    num_bytes: int


@runtime_checkable
class Mailbox(Protocol):
    """Where a federation's state lives. Implementations survive being killed at any moment."""

    address: str

    def head(self) -> int | None:
        """The newest published round, None before round 0 was published."""

    def read(self, round: int, name: str) -> bytes:
        """A file of a published round. Raises `MailboxError` when it is not there."""

    def publish(self, round: int, files: Mapping[str, bytes]) -> None:
        """Publish a round in one atomic step. Raises `RoundConflictError` if that round exists already."""

    def refresh_root(self) -> None:
        """Make the files that plain PEFT users read (the adapter at the mailbox's root) those of the newest round."""

    def post_update(self, round: int, client_id: str, message: bytes) -> None:
        """Post a client's message; posting the same bytes again changes nothing.

        Raises `UpdateConflictError` if the client already posted other bytes for this round.
        """

    def list_updates(self, round: int) -> Sequence[UpdateRef]:
        """The round's messages in client-id order, without reading them."""

    def read_update(self, ref: UpdateRef) -> bytes:
        """One message, whole."""

    def post_metric(self, round: int, source: str, metrics: Mapping[str, Any]) -> None:
        """Post what was measured on a round's adapter, replacing an earlier post; `source` names the evaluation set."""

    def read_metrics(self, round: int) -> dict[str, dict[str, Any]]:
        """All posted metrics of a round by source."""


def open_mailbox(address: str) -> Mailbox:
    """The mailbox at an address: a folder path.

    Raises:
        MailboxError: the address has a scheme that no installed mailbox serves.
    """
    if "://" in address and not address.startswith("file://"):
        scheme = address.split("://", 1)[0]
        raise MailboxError(f"No mailbox serves {scheme}:// addresses (given: {address}); give the path of a folder.")
    from fedfstq_hf.federation.local import FolderMailbox

    return FolderMailbox(address.removeprefix("file://"))
