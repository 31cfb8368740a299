"""What may change between rounds: who is enrolled, and whether the federation is paused.

It lies in the mailbox beside the rounds, is written by the coordinator's people and read by everyone.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedfstq_hf.errors import ConfigError, MailboxError
from fedfstq_hf.federation.keys import parse_public_key
from fedfstq_hf.federation.mailbox.protocol import Mailbox, checked_repo
from fedfstq_hf.federation.storage import checked_name
from fedfstq_hf.text import parse_object, printable

FORMAT = 1
MAX_BYTES = 4 * 10**6
"""Some 30,000 clients, each with a key."""
_TRIES = 50


@dataclass(frozen=True)
class Enrolment:
    """One enrolled client.

    Attributes:
        repo: Hub repo that its messages are read from, where it is not the one named after it. Where it writes them is
            its own decision.
        account: Hub account whose pull requests are its own.
        verify_key: Ed25519 public key that its messages are signed with.
        max_examples: it counts at most as that many examples.
    """

    repo: str | None = None
    account: str | None = None
    verify_key: str | None = None
    max_examples: int | None = None

    def __post_init__(self) -> None:
        if self.max_examples is not None and (type(self.max_examples) is not int or self.max_examples < 1):
            raise ConfigError(f"max_examples must be a whole number of at least 1, not {self.max_examples!r}.")
        if self.repo is not None:
            checked_repo(self.repo)
        if self.account is not None and not isinstance(self.account, str):
            raise ConfigError(f"account must be the name of a Hub account, not {self.account!r:.40}.")
        if self.verify_key is not None:
            parse_public_key(self.verify_key, "ed25519")


@dataclass(frozen=True)
class Control:
    """The federation's control file.

    Attributes:
        clients: enrolled clients by id; None lets anybody join who can write to the mailbox.
        paused: why no round is closed at present; None while the federation runs.
    """

    clients: Mapping[str, Enrolment] | None = None
    paused: str | None = None
    format: int = field(default=FORMAT)

    def enrolled(self, client_id: str) -> bool:
        """Whether the client may take part."""
        return self.clients is None or client_id in self.clients

    def enrolment(self, client_id: str) -> Enrolment:
        """What is known of a client."""
        return (self.clients or {}).get(client_id, Enrolment())

    def select(self, round: int, seed: int, count: int | None) -> tuple[str, ...] | None:
        """The clients asked for an update of `round`: `count` of the enrolled ones, drawn by seed and round.

        None, for all, when `count` is None or nobody is enrolled by name.
        """
        if count is None or self.clients is None or count >= len(self.clients):
            return None
        return tuple(sorted(random.Random(f"{seed}/{round}").sample(sorted(self.clients), count)))

    def to_json(self) -> bytes:
        """Readable JSON with sorted keys."""
        fields: dict[str, Any] = {"format": self.format, "paused": self.paused, "clients": None}
        if self.clients is not None:
            fields["clients"] = {
                client: {key: value for key, value in dataclasses.asdict(enrolment).items() if value is not None}
                for client, enrolment in self.clients.items()
            }
        return (json.dumps(fields, indent=1, sort_keys=True) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes | None) -> Control:
        """Parse the control file; the default where there is none.

        Raises:
            MailboxError: it cannot be understood. Guessing who is enrolled would not be safe.
        """
        if data is None:
            return cls()
        try:
            fields = parse_object(data, "It", max_bytes=MAX_BYTES)
        except MailboxError as error:
            raise _unreadable(error) from None
        if fields.get("format", FORMAT) != FORMAT:
            raise MailboxError(
                f"The federation's control file has format {printable(repr(fields['format']), 40)}; this version "
                f"reads {FORMAT}."
            )
        try:
            clients, paused, _ = fields["clients"], fields["paused"], fields["format"]
            if clients is not None:
                clients = {checked_name(name): Enrolment(**entry) for name, entry in clients.items()}
            if not isinstance(paused, str | None):
                raise TypeError(f"paused is {paused!r:.40}, expected a reason or null")
            return cls(clients=clients, paused=paused)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _unreadable(error) from error


def _unreadable(error: Exception) -> MailboxError:
    return MailboxError(
        f"The federation's control file cannot be read ({printable(error)}). Restore it from the mailbox's history."
    )


def read_control(mailbox: Mailbox) -> Control:
    """The mailbox's present control file."""
    return Control.from_json(mailbox.read_control())


def change_control(mailbox: Mailbox, change: Callable[[Control], Control]) -> Control:
    """Replace the control file by `change` of it, whoever else changes it meanwhile; returns the new one."""
    for _ in range(_TRIES):
        present = mailbox.read_control()
        control = change(Control.from_json(present))
        data = control.to_json()
        if data == present or mailbox.write_control(data, expected=present):
            return control
    raise MailboxError(
        f"The control file of {mailbox.address} was changed by somebody else {_TRIES} times in a row. Try again later."
    )


def enrol(clients: Sequence[str], **fields: Any) -> Callable[[Control], Control]:
    """A change that enrols clients, or sets the given fields of enrolled ones."""
    for client in clients:
        checked_name(client)

    def change(control: Control) -> Control:
        enrolled = dict(control.clients or {})
        for client in clients:
            enrolled[client] = dataclasses.replace(enrolled.get(client, Enrolment()), **fields)
        return dataclasses.replace(control, clients=enrolled)

    return change


def dismiss(client: str) -> Callable[[Control], Control]:
    """A change that takes a client off the list; its further updates are refused."""

    def change(control: Control) -> Control:
        if control.clients is None or client not in control.clients:
            names = ", ".join(sorted(control.clients or {})) or "none by name"
            raise ConfigError(f"{client!r} is not enrolled; enrolled are {names}.")
        return dataclasses.replace(
            control, clients={name: entry for name, entry in control.clients.items() if name != client}
        )

    return change


def pause(reason: str) -> Callable[[Control], Control]:
    """A change that stops rounds from being closed, for a reason that everybody is shown."""
    return lambda control: dataclasses.replace(control, paused=reason or "no reason given")


def resume(control: Control) -> Control:
    """The change that lets rounds be closed again."""
    return dataclasses.replace(control, paused=None)
