"""Clients of the light federation that share token sensitivities, signed and sealed; the table is any bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from light import SCHEMA, fake_training, pause

from fedfstq_hf.codec import message
from fedfstq_hf.codec.budget import MessageBudget
from fedfstq_hf.federation import keys
from fedfstq_hf.federation.client.participation import MailboxParticipation
from fedfstq_hf.federation.client.session import ClientSession
from fedfstq_hf.federation.mailbox.protocol import SALIENCY_FILE, Mailbox
from fedfstq_hf.federation.record import RoundRecord
from fedfstq_hf.federation.server.coordinator import Coordinator
from fedfstq_hf.federation.spec import FederationSpec


def spec_of(mailbox: Mailbox) -> FederationSpec:
    return FederationSpec.from_json(mailbox.read(0, "spec.json"))


def record_of(mailbox: Mailbox, round: int) -> RoundRecord:
    return RoundRecord.from_json(mailbox.read(round, "round.json"))


def take_part(mailbox: Mailbox, client_id: str, table: bytes | None, pair: keys.KeyPair | None = None) -> None:
    """One client's turn in the open round."""
    spec = spec_of(mailbox)
    sign = None if pair is None else keys.signer(pair, spec.id)
    session = ClientSession(client_id, spec, SCHEMA, folder=None, sign=sign)
    participation = MailboxParticipation(
        mailbox, session, budget=MessageBudget(), sleep=pause, saliency=lambda carried: table
    )
    assignment = participation.next()
    assert assignment is not None
    participation.complete(assignment, fake_training(assignment.adapter, assignment.seed, {}))


def attachment(
    mailbox: Mailbox, client_id: str, data: bytes, *, sign: Callable[[bytes], bytes] | None = None, **changes: object
) -> bytes:
    """An attachment to the open round, not sealed; `changes` are fields of its header."""
    round = mailbox.head() or 0
    settings = {
        "client_id": client_id,
        "round": round,
        "num_examples": 0,
        "base": record_of(mailbox, round).adapter_digest,
        "schema": SCHEMA.fingerprint,
        "codec": "attachment",
        "params": {"name": SALIENCY_FILE},
    } | changes
    return message.pack(message.Header(**settings), data, sign=sign)


class Joining:
    """A coordinator that publishes what it was given to join."""

    def __init__(self, mailbox: Mailbox, pair: keys.KeyPair | None = None) -> None:
        self.seen: list[bytes] = []
        unseal = None if pair is None else partial(keys.unseal, pair)
        self.coordinator = Coordinator(mailbox, unseal=unseal, saliency=self._join)

    def _join(self, files: Sequence[tuple[bytes, float]]) -> Mapping[str, bytes]:
        self.seen = [data for data, _ in files]
        return {"joined": b"+".join(self.seen)}

    def close_round(self) -> RoundRecord:
        record = self.coordinator.close_round()
        assert record is not None
        return record
