"""What is around a message: its signature, its seal, and the header, compared with what the reader expects.

Neither side needs a mailbox for it: a client closes a message, whoever gets it opens it.

Round records as they lie in a mailbox: signed by the founder, with sealed figures, and read back.

The spec names the founder's key and clients keep the spec, so a mailbox cannot change it under them. A record names the
adapter by its digest, says who is asked, and what became of each message: whoever forges one decides all of that.

A sealed federation's public records do not show examples, weight, norm and scale of single clients: they say what a
client has and how much its training moved. Only the coordinator needs them again, to take previews back as they were
counted. So it seals them to its own key, and the record carries the box.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fedfstq_hf.codec import message
from fedfstq_hf.errors import ConfigError, MailboxError, MessageError
from fedfstq_hf.federation import keys
from fedfstq_hf.federation.keys import Sign, Unseal
from fedfstq_hf.federation.mailbox.protocol import RECORD_FILE, Mailbox
from fedfstq_hf.federation.record import FIGURES, AcceptedUpdate, RoundRecord
from fedfstq_hf.federation.spec import FederationSpec
from fedfstq_hf.text import parse_object

Verify = Callable[[bytes, bytes | None], bool]
"""Digest and signature of a message -> whether it is signed; raises `MessageError` where it should be and is not."""


@dataclass(frozen=True)
class Expected:
    """What a message's header must say.

    Attributes:
        client_id: who sent it.
        round: whose local training it is from.
        base: `adapter_file.digest` of the adapter that training started from, hex.
        schema: `Schema.fingerprint` of what the message is about, hex.
        codec: its name.
    """

    client_id: str
    round: int
    base: str
    schema: str
    codec: str


@dataclass(frozen=True)
class Opened:
    """A message that is what was expected. `signed`: its signature was verified."""

    header: message.Header
    payload: bytes
    signed: bool


def seal_message(readable: bytes, sealing_key: str | None) -> bytes:
    """What travels of a message (`message.pack`): sealed to its reader's key, or as it is where there is none."""
    return readable if sealing_key is None else keys.seal(sealing_key, readable)


def open_message(
    data: bytes,
    expected: Expected,
    *,
    max_bytes: int,
    sealed: bool = False,
    unseal: Unseal | None = None,
    verify: Verify | None = None,
) -> Opened:
    """Open what a client sent.

    Args:
        data: as it travelled.
        expected: what its header must say.
        max_bytes: of the message without its seal.
        sealed: messages are sealed; a plain one is refused, and the other way round.
        unseal: opens them with the reader's private key.
        verify: checks the signature; None takes the message as unsigned.

    Raises:
        MessageError: it is malformed, or another message than that.
    """
    header, payload, digest, signature = message.unpack_signed(_unsealed(data, sealed, unseal), max_bytes=max_bytes)
    compared = {
        "client": (header.client_id, expected.client_id),
        "round": (header.round, expected.round),
        "base adapter": (header.base, expected.base),
        "schema": (header.schema, expected.schema),
        "codec": (header.codec, expected.codec),
    }
    for what, (given, wanted) in compared.items():
        if given != wanted:
            raise MessageError(f"It names {what} {given}; expected {wanted}.")
    return Opened(header, payload, verify is not None and verify(digest, signature))


def _unsealed(data: bytes, sealed: bool, unseal: Unseal | None) -> bytes:
    if message.is_sealed(data) != sealed:
        raise MessageError(
            "It is not sealed; this federation takes sealed messages only."
            if sealed
            else "It is sealed, but this federation has no sealing key."
        )
    if not sealed:
        return data
    if unseal is None:
        raise MessageError("It is sealed, and this coordinator was started without the key: give --key FILE.")
    return unseal(data)


_ENTRIES = ("accepted", "refinements")
_MAX_BYTES = 10**8
_KEPT = 64


class Records:
    """`records(round)` is the round's record, signed as the spec demands.

    unseal: opens what a sealed federation's records hide, for the coordinator. `num_bytes` is what was downloaded.
    """

    def __init__(self, mailbox: Mailbox, spec: FederationSpec, unseal: Unseal | None = None) -> None:
        self._mailbox = mailbox
        self._spec = spec
        self._unseal = unseal
        self._kept: dict[int, RoundRecord] = {}
        self.num_bytes = 0

    def __call__(self, round: int) -> RoundRecord:
        """Raises `MailboxError` if there is no such round, or its record cannot be read or is forged."""
        if round not in self._kept:
            data = self._mailbox.read(round, RECORD_FILE)
            self.num_bytes += len(data)
            record = RoundRecord.from_json(data)
            if record.round != round:
                raise MailboxError(
                    f"{self._mailbox.address} holds the record of round {record.round} where that of round {round} "
                    "belongs. Restore it from a backup."
                )
            check_record(record, self._spec)
            self.add(record if self._unseal is None else open_figures(record, self._unseal))
        return self._kept[round]

    def add(self, record: RoundRecord) -> None:
        """Keep a record that is known already."""
        self._kept[record.round] = record
        while len(self._kept) > _KEPT:
            del self._kept[next(iter(self._kept))]


def sign_record(record: RoundRecord, spec: FederationSpec, sign: Sign | None) -> RoundRecord:
    """The record with its signature; as it is where the spec names no founder's key.

    Raises:
        ConfigError: it names one, and there is no `sign`.
    """
    if spec.founder_key is None:
        return record
    if sign is None:
        raise ConfigError(
            f"Records of this federation are signed with {spec.founder_key}. Type --key KEYFILE with the key file that "
            "this public key belongs to."
        )
    return dataclasses.replace(record, signature=sign(_digest(record)).hex())


def check_record(record: RoundRecord, spec: FederationSpec) -> None:
    """Raise MailboxError unless the founder signed it, or the spec names no founder's key."""
    if spec.founder_key is None:
        return
    try:
        keys.verify(spec.founder_key, spec.id, _digest(record), bytes.fromhex(record.signature))
    except (MessageError, ValueError, TypeError):
        raise MailboxError(
            f"The record of round {record.round} is not signed with {spec.founder_key}, the key of this federation's "
            "founder: somebody else wrote it. Nothing of it was used; ask the founder."
        ) from None


def _digest(record: RoundRecord) -> bytes:
    return hashlib.sha256(b"fedfstq record\n" + dataclasses.replace(record, signature="").to_json()).digest()


def seal_figures(record: RoundRecord, seal_key: str) -> RoundRecord:
    """The record with its figures in a box as well; `RoundRecord.to_json` then writes them nowhere else."""
    content: dict[str, Any] = {
        name: [[getattr(update, figure) for figure in FIGURES] for update in getattr(record, name)] for name in _ENTRIES
    }
    content["adapter"] = record.adapter_sha256  # no box of another record
    box = keys.seal(seal_key, json.dumps(content, separators=(",", ":")).encode())
    return dataclasses.replace(record, sealed=base64.b64encode(box).decode())


def open_figures(record: RoundRecord, unseal: Unseal) -> RoundRecord:
    """The record with the figures from its box; as it is where it has none.

    Raises:
        MailboxError: the box is damaged, of another record, or sealed to another key.
    """
    if record.sealed is None:
        return record
    what = f"The box of figures in the record of round {record.round}"
    try:
        content = parse_object(unseal(base64.b64decode(record.sealed, validate=True)), what, max_bytes=_MAX_BYTES)
        if content["adapter"] != record.adapter_sha256:
            raise ValueError("it is another record's")
        opened: dict[str, Any] = {name: _with_figures(getattr(record, name), content[name]) for name in _ENTRIES}
    except (MessageError, ValueError, KeyError, TypeError) as error:
        raise MailboxError(
            f"{what} cannot be opened: {error}. Restore the record from the mailbox's history."
        ) from error
    return dataclasses.replace(record, **opened)


def _with_figures(updates: tuple[AcceptedUpdate, ...], rows: list[list[Any]]) -> tuple[AcceptedUpdate, ...]:
    if any(type(value) not in (int, float) or value < 0 for row in rows for value in row):
        raise ValueError("it holds something else than figures")
    return tuple(
        dataclasses.replace(update, **dict(zip(FIGURES, row, strict=True)))
        for update, row in zip(updates, rows, strict=True)
    )
