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
from fedfstq_hf.federation.spec import FederationSpec
from fedfstq_hf.federation.storage import checked_name
from fedfstq_hf.ranges import Number, Range, Whole
from fedfstq_hf.text import parse_object, printable

FORMAT = 1
MAX_BYTES = 4 * 10**6
"""Some 30,000 clients, each with a key."""
_TRIES = 50
_ENDLESS = ("constant", "constant_with_warmup", "inverse_sqrt")
"""Schedules that go on after the last step."""
_RULES: dict[str, Range] = {
    "rounds": Whole(1, 10**6),
    "min_clients": Whole(1, 10**6),
    "round_seconds": Number(),
}


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
        rounds, min_clients, round_seconds: take the place of the spec's, where they were changed since the founding;
            a `round_seconds` of 0 is none.
    """

    clients: Mapping[str, Enrolment] | None = None
    paused: str | None = None
    rounds: int | None = None
    min_clients: int | None = None
    round_seconds: float | None = None
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
        changed = {name: getattr(self, name) for name in _RULES}
        fields |= {name: value for name, value in changed.items() if value is not None}
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
            rules = {name: fields[name] for name in _RULES if fields.get(name) is not None}
            for name, value in rules.items():
                _RULES[name].check(name, value)
            return cls(clients=clients, paused=paused, **rules)
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


def dismiss(clients: Sequence[str], min_clients: int = 0) -> Callable[[Control], Control]:
    """A change that takes clients off the list; their further updates are refused.

    min_clients: updates that close a round; with fewer on the list none could ever close.
    """

    def change(control: Control) -> Control:
        for client in clients:
            if control.clients is None or client not in control.clients:
                names = ", ".join(sorted(control.clients or {})) or "none by name"
                raise ConfigError(f"{client!r} is not enrolled; enrolled are {names}.")
        left = {name: entry for name, entry in (control.clients or {}).items() if name not in clients}
        if len(left) < min_clients:
            raise ConfigError(
                f"{len(left)} clients would be left, but {min_clients} updates close a round: it could never close. "
                f"Enrol others first, or type: fedfstq extend MAILBOX --min-clients {max(1, len(left))}"
            )
        return dataclasses.replace(control, clients=left)

    return change


def reopen(control: Control) -> Control:
    """The change that lets anybody take part again."""
    return dataclasses.replace(control, clients=None)


@dataclass(frozen=True)
class Rules:
    """When rounds close and the federation ends: the spec's, or what `extend` made of them."""

    rounds: int
    min_clients: int
    round_seconds: float | None


def rules(spec: FederationSpec, control: Control) -> Rules:
    """What holds now."""
    seconds = spec.round_seconds if control.round_seconds is None else control.round_seconds or None
    return Rules(control.rounds or spec.rounds, control.min_clients or spec.min_clients, seconds)


def extend(spec: FederationSpec, **changes: Any) -> Callable[[Control], Control]:
    """A change of `rounds`, `min_clients` or `round_seconds`.

    Raises:
        ConfigError: a value is out of range; fewer clients are enrolled than are to close a round; or the learning rate
            has a schedule that ends with the spec's rounds.
    """
    for name, value in changes.items():
        _RULES[name].check(name, value)
    schedule = spec.training.get("lr_scheduler_type", "constant")
    if changes.get("rounds", 0) > spec.rounds and schedule not in _ENDLESS:
        raise ConfigError(
            f"The learning rate follows schedule {schedule!r}, which ends with round {spec.rounds}: further rounds "
            "would change nothing. Found another federation from this one's adapter."
        )

    def change(control: Control) -> Control:
        changed = dataclasses.replace(control, **changes)
        least = rules(spec, changed).min_clients
        asked = (
            spec.clients_per_round
            if changed.clients is None
            else min(len(changed.clients), spec.clients_per_round or len(changed.clients))
        )
        if asked is not None and asked < least:
            raise ConfigError(
                f"min_clients is {least}, but {asked} clients are asked in a round: it could never close."
            )
        return changed

    return change


def describe_rules(control: Control) -> str:
    """What was changed, in words."""
    words = {
        "rounds": "{} rounds in all",
        "min_clients": "{} updates close a round",
        "round_seconds": "a round closes after {:g} s",
    }
    told = [words[name].format(value) for name in _RULES if (value := getattr(control, name)) is not None]
    return ", ".join(told).replace("a round closes after 0 s", "rounds have no deadline")


def pause(reason: str) -> Callable[[Control], Control]:
    """A change that stops rounds from being closed, for a reason that everybody is shown."""
    return lambda control: dataclasses.replace(control, paused=reason or "no reason given")


def resume(control: Control) -> Control:
    """The change that lets rounds be closed again."""
    return dataclasses.replace(control, paused=None)
