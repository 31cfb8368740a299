"""What is around a message: its signature, its seal, and the header, compared with what the reader expects.

Neither side needs a mailbox for it: a client closes a message, whoever gets it opens it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fedfstq_hf.codec import message
from fedfstq_hf.errors import MessageError
from fedfstq_hf.federation import keys
from fedfstq_hf.federation.keys import Unseal

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
    if keys.is_sealed(data) != sealed:
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
