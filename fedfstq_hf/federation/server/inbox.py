"""The inbox of an open round: messages to use now, and late ones of closed rounds that no record names."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Collection, Iterable, Sequence

from fedfstq_hf.errors import MailboxError, MailboxUnavailableError, MessageError
from fedfstq_hf.federation.control import read_control
from fedfstq_hf.federation.mailbox.protocol import Mailbox, UpdateRef
from fedfstq_hf.federation.record import RefusedUpdate, RoundRecord
from fedfstq_hf.federation.spec import FederationSpec
from fedfstq_hf.text import printable

logger = logging.getLogger(__name__)

LOOK_BACK = 8
"""Closed rounds that each new record looks at for messages that came too late; the last record looks at all."""


class Inbox:
    """The messages around one open round, without reading them; only what is refused unread is hashed.

    Args:
        round: the open one.
        record: round -> its record, up to that of `round`.
        max_bytes: larger messages are not read.
    """

    def __init__(
        self,
        mailbox: Mailbox,
        spec: FederationSpec,
        round: int,
        record: Callable[[int], RoundRecord],
        *,
        max_bytes: int,
    ) -> None:
        self._mailbox = mailbox
        self._spec = spec
        self._round = round
        self._record = record
        self._max_bytes = max_bytes

    def of(self, round: int, without: Collection[str] = (), *, refinements: bool = False) -> list[UpdateRef]:
        """Messages of enrolled clients for a round, but those of `without`, in client-id order.

        Where only some were asked in a round that is long over, only they are looked for: the others may be thousands.
        """
        control, selected = read_control(self._mailbox), self._record(round).selected
        enrolled = None if control.clients is None else set(control.clients)
        if selected is not None and enrolled is not None and round < self._round - self._spec.method.max_staleness - 1:
            enrolled &= set(selected)
        clients = None if enrolled is None else sorted(enrolled.difference(without))
        refs = self._mailbox.list_updates(round, clients, refinements=refinements)
        return [ref for ref in refs if ref.client_id not in without]

    def updates(self, rounds_back: int) -> tuple[list[UpdateRef], list[UpdateRef]]:
        """Updates to collect now, in client-id order, and late ones of up to `rounds_back` rounds that came too late.

        A client counts once: beside a newer update, an old one of its own is not used.
        """
        earlier = unnamed(self._round, rounds_back, self.of, self._record)
        oldest = self._oldest_usable()
        in_time = [ref for ref in earlier if ref.round >= oldest]
        newest = {ref.client_id: ref for ref in (*in_time, *self.of(self._round))}
        used = set(newest.values())
        return sorted(used), [ref for ref in earlier if ref not in used]

    def refinements(self) -> list[UpdateRef]:
        """Second messages of the round before, which are used now."""
        return self._refinements_of(self._round - 1) if self._round else []

    def silent(self, heard: Iterable[UpdateRef]) -> list[UpdateRef]:
        """Second messages of the open round from clients without a first one: theirs would have said nothing."""
        clients = {ref.client_id for ref in heard}
        return [ref for ref in self._refinements_of(self._round) if ref.client_id not in clients]

    def stopped(self) -> tuple[RefusedUpdate, ...]:
        """Second messages of the open round, if it is the last one because the federation is stopped."""
        reason = "The federation was stopped, and this round's previews count in full."
        return tuple(self.unused(ref, reason) for ref in self._refinements_of(self._round))

    def late_refinements(self, rounds_back: int) -> list[UpdateRef]:
        """Second messages of up to `rounds_back` rounds before that one which no record names."""
        return unnamed(self._round, rounds_back, self._refinements_of, self._record, refinements=True)

    def late(self, refs: Iterable[UpdateRef]) -> tuple[RefusedUpdate, ...]:
        """Their entries in a record."""
        reason = "It arrived after round {} was closed."
        return tuple(self.unused(ref, reason.format(ref.round + ref.refinement)) for ref in refs)

    def unused(self, ref: UpdateRef, reason: str) -> RefusedUpdate:
        """The entry of a message that is refused unread."""
        other = ref.round if ref.round != self._round else None
        return RefusedUpdate(
            ref.client_id, ref.sha256 or self._sha256(ref), ref.num_bytes, reason, other, ref.refinement
        )

    def _refinements_of(self, round: int, without: Collection[str] = ()) -> list[UpdateRef]:
        return self.of(round, without, refinements=True) if self._spec.refines(round) else []

    def _oldest_usable(self) -> int:
        """The earliest round whose updates may still be used: none from before a rollback, which is to undo them."""
        oldest = max(self._round - self._spec.method.max_staleness, 0)
        restored = (r for r in range(self._round, oldest, -1) if self._record(r).restored_from is not None)
        return next(restored, oldest)

    def _sha256(self, ref: UpdateRef) -> str:
        """Of its bytes; empty where it is too large to be read, or cannot be read any more."""
        if ref.num_bytes > self._max_bytes:
            return ""
        try:
            return hashlib.sha256(self._mailbox.read_update(ref, max_bytes=ref.num_bytes)).hexdigest()
        except MailboxUnavailableError:
            raise
        except (MailboxError, MessageError) as error:
            logger.warning(
                "The message of client %s for round %d, which is not used, cannot be read: %s",
                ref.client_id,
                ref.round,
                printable(error),
            )
            return ""


def unnamed(
    open_round: int,
    rounds_back: int,
    refs: Callable[[int, Collection[str]], Sequence[UpdateRef]],
    record: Callable[[int], RoundRecord],
    *,
    refinements: bool = False,
) -> list[UpdateRef]:
    """Late updates: those of the last `rounds_back` closed rounds that no record names, oldest round first.

    Args:
        refs: round and clients to leave out -> the messages of others that lie there.
        record: round -> its record; each is asked for once.
        refinements: they are second messages, which are in time for one round more.
    """
    closed = open_round - refinements
    named: dict[int, set[str]] = {round: set() for round in range(max(closed - rounds_back, 0), closed)}
    for number in range(min(named, default=open_round) + 1, open_round + 1):
        entry = record(number)
        for round, clients in named.items():
            if round < number:
                clients |= entry.named(round, refinements=refinements)
    return [ref for round, clients in named.items() for ref in refs(round, clients)]
