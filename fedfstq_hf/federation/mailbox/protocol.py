"""The mailbox protocol: where published rounds lie and clients' messages arrive. A mailbox never decodes a message.

A mailbox holds immutable rounds (`round.json`, the adapter, ...) that only the coordinator publishes, for each round
at most one message per client (two, where the federation has refinements), and at its root what people and plain PEFT
read.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from huggingface_hub.utils import HFValidationError, validate_repo_id

from fedfstq_hf.errors import ConfigError
from fedfstq_hf.text import printable

ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG_FILE = "adapter_config.json"
RECORD_FILE = "round.json"
SPEC_FILE = "spec.json"
FRAME_FILE = "frame.safetensors"
RESIDUAL_FILE = "downlink_residual.safetensors"
SERVER_STATE_FILE = "server_optimizer.safetensors"
HISTORY_FILE = "history.jsonl"
CARD_FILE = "README.md"
VARIATE_FILE = "control_variate.safetensors"
SALIENCY_FILE = "saliency.safetensors"
ATTACHMENTS = (SALIENCY_FILE,)
"""What a client may send beside its messages; one file of each name."""

ONE_SHOT_SECONDS = 30.0
"""Patience of a command that looks once, and of the first look of one that stays."""
UNATTENDED_SECONDS = 900.0
"""Patience where rounds close by a deadline."""

LAYOUTS = ("own", "shared", "pull-request")

RootReader = Callable[[str], bytes | None]
"""Reads a file at the mailbox's root as it is now, None where there is none."""
RootFiles = Callable[[RootReader], Mapping[str, bytes]]
"""Makes the root's files (card, history, plot) for a round, from those that are there: people may have edited them."""


def checked_repo(repo: object) -> str:
    """`repo`, if it names a repo on the Hub: ORG/NAME.

    Raises:
        ConfigError: it does not.
    """
    try:
        if not isinstance(repo, str) or repo.count("/") != 1:
            raise HFValidationError
        validate_repo_id(repo)
    except HFValidationError:
        raise ConfigError(
            f"{printable(repo)!r} names no repo on the Hub. Type ORG/NAME, such as my-org/med-lora-ward-a."
        ) from None
    return repo


@dataclass(frozen=True, order=True)
class UpdateRef:
    """A message that lies in the mailbox: who sent it for which round, and how many bytes it has.

    `sha256` is given where the mailbox knows it without reading the message; `location` is the mailbox's own business.
    `refinement`: it is the client's second message of that round (see `federation.server.refining`).
    """

    client_id: str
    round: int
    num_bytes: int
    sha256: str = ""
    location: str = field(default="", compare=False)
    refinement: bool = False


@runtime_checkable
class Mailbox(Protocol):
    """Where a federation's state lives. Implementations survive being killed at any moment."""

    address: str

    def set_patience(self, seconds: float) -> None:
        """How long a request is repeated while the mailbox does not answer; infinity: as long as it takes."""

    def head(self) -> int | None:
        """The newest published round, None before round 0 was published."""

    def read(self, round: int, name: str, *, max_bytes: int | None = None) -> bytes:
        """A file of a published round. Raises `MailboxError` when it is not there, or larger than `max_bytes`."""

    def read_root(self, name: str) -> bytes | None:
        """A file at the root as it is now, None where there is none."""

    def publish(self, round: int, files: Mapping[str, bytes], root: RootFiles | None = None) -> None:
        """Publish a round in one atomic step, and renew the root: the adapter and what `root` makes.

        Raises `RoundConflictError` if that round exists already.
        """

    def refresh_root(self, root: RootFiles | None = None) -> None:
        """Make the root's files those of the newest round: what `publish` does, again."""

    def read_control(self) -> bytes | None:
        """What may change between rounds (see `federation.control`), None where it was never written."""

    def write_control(self, data: bytes, *, expected: bytes | None) -> bool:
        """Replace it if it still is `expected`; False if somebody else wrote first."""

    def check_client(self, client_id: str) -> None:
        """Raise `MailboxError` if this client may not post, as far as that can be known before it trains."""

    def post_update(
        self, round: int, client_id: str, message: bytes, *, patience: float | None = None, refinement: bool = False
    ) -> None:
        """Post a client's message; posting the same bytes again changes nothing.

        Args:
            patience: seconds to go on trying, None for as long as the mailbox's own setting says.
            refinement: it is the second one of that round.

        Raises:
            UpdateConflictError: the client already posted other bytes for this round.
            MailboxUnavailableError: patience ran out. Whether the message arrived is then unknown.
        """

    def list_updates(
        self, round: int, clients: Sequence[str] | None = None, *, refinements: bool = False
    ) -> Sequence[UpdateRef]:
        """The round's first or second messages in client-id order, without reading them; of `clients` only, or all."""

    def read_update(self, ref: UpdateRef, *, max_bytes: int) -> bytes:
        """One message, whole. Raises `MessageError` if it turns out larger than `max_bytes`."""

    def post_metric(self, round: int, source: str, metrics: Mapping[str, Any], *, client_id: str | None = None) -> None:
        """Post what was measured on a round's adapter, replacing an earlier post; `source` names the evaluation set.

        `client_id` is given by a client that may not write what the coordinator writes.
        """

    def read_metrics(self, clients: Sequence[str] = ()) -> dict[int, dict[str, dict[str, Any]]]:
        """All posted metrics: round -> source -> name -> value; those that `clients` posted included."""

    def post_attachment(self, client_id: str, name: str, data: bytes) -> None:
        """Post one of a client's `ATTACHMENTS`, replacing an earlier one."""

    def read_attachment(self, client_id: str, name: str, *, max_bytes: int) -> bytes | None:
        """What a client attached, None if nothing. Raises `MessageError` if it is larger than `max_bytes`."""

    def attachment_bytes(self, client_id: str, name: str) -> int:
        """Its size, however large, without reading it; 0 if nothing is there."""

    def housekeep(self, round: int, *, clients: int, keep_rounds: int, tag: bool, finished: bool = False) -> None:
        """After publishing `round`: tag it, drop messages that are older than `keep_rounds`. Best effort."""


_GROWTH = 1.3
_LONGEST = 8.0  # times the first pause


class Polling:
    """The pauses between two looks at a mailbox: short at first, longer while nothing happens.

    Args:
        seconds: mean length of the first pause; each is 1.3 times as long as the one before, up to 8 times the first.
        jitter: a pause is up to that share longer or shorter, so that many processes do not stay in step.
        sleep: a test passes its own.
    """

    def __init__(self, seconds: float, *, jitter: float, sleep: Callable[[float], None] = time.sleep) -> None:
        self._seconds = self._wait = seconds
        self._jitter = jitter
        self._sleep = sleep

    def pause(self, at_most: float = math.inf) -> None:
        """Sleep; before jitter no longer than `at_most` seconds."""
        self._sleep(min(self._wait, at_most) * random.uniform(1 - self._jitter, 1 + self._jitter))
        self._wait = min(self._wait * _GROWTH, self._seconds * _LONGEST)

    def reset(self) -> None:
        """Something happened: the next pause is as short as the first."""
        self._wait = self._seconds
