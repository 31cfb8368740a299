"""The open round as the coordinator finds it: who was heard, what is used, and what is too late for it.

The inbox of an open round: messages to use now, and late ones of closed rounds that no record names.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from torch import Tensor

from fedfstq_hf.codec.schema import TrainedPart
from fedfstq_hf.errors import MailboxError, MailboxUnavailableError, MessageError
from fedfstq_hf.federation.aggregation import UsualNorm
from fedfstq_hf.federation.control import Control, read_control
from fedfstq_hf.federation.envelope import Records
from fedfstq_hf.federation.keys import Unseal
from fedfstq_hf.federation.mailbox.protocol import Mailbox, UpdateRef
from fedfstq_hf.federation.record import RefusedUpdate, RoundRecord
from fedfstq_hf.federation.server.collecting import Collected, Collector
from fedfstq_hf.federation.server.refining import Refined, refine
from fedfstq_hf.federation.server.screening import Screening
from fedfstq_hf.federation.spec import FederationSpec
from fedfstq_hf.text import printable


class OpenRound:
    """The messages for one open round, and for the rounds before it that no record names yet.

    Args:
        mailbox: holds the messages.
        spec: of the federation.
        record: of the open round; its adapter is what the round's updates start from.
        records: of all rounds up to it.
        trained: what of the adapter messages are about.
        adapter: of the open round, whole, (num_params,) float32; bounds what clipping takes for usual.
        unseal: opens sealed messages.
        overdue: whether the round's deadline has passed. It is open still because nobody whom it asked has sent
            anything; from then on any client that is enrolled may.
    """

    def __init__(
        self,
        mailbox: Mailbox,
        spec: FederationSpec,
        record: RoundRecord,
        records: Records,
        trained: TrainedPart,
        adapter: Tensor,
        unseal: Unseal | None,
        overdue: Callable[[], bool] = lambda: False,
    ) -> None:
        self._mailbox = mailbox
        self._spec = spec
        self._record = record
        self._records = records
        self._schema = trained.schema
        self._adapter = adapter
        self._unseal = unseal
        self._overdue = overdue
        self.inbox = Inbox(mailbox, spec, record.round, records, max_bytes=self.screening().max_bytes)
        self._collector = self._collector_of(record.round)

    def screening(self) -> Screening:
        """What opens messages, by who is enrolled now."""
        return Screening(self._spec, self._schema, read_control(self._mailbox), self._unseal)

    def heard(self, control: Control) -> int:
        """How many clients have sent something for the round that was not refused before."""
        usable, _ = self.inbox.updates(self._spec.method.max_staleness)
        return len(self._collector.open([*usable, *self.inbox.silent(usable)], control))

    def silent(self) -> int:
        """How many clients have no preview in the round, and a refinement that can be used a round later."""
        usable, _ = self.inbox.updates(self._spec.method.max_staleness)
        refs = self.inbox.silent(usable)
        return len(self._collector.collect(refs, self.screening()).accepted) if refs else 0

    def collect(self, *, finished: bool = False) -> Collected:
        """The round's updates, screened and averaged.

        Args:
            finished: no round follows: whatever arrived and stands in no record is named now.
        """
        usable, late = self._arrived(finished)
        return dataclasses.replace(self._collector.collect(usable, self.screening()), late=self.inbox.late(late))

    def refuse_all(self, reason: str, *, finished: bool) -> tuple[tuple[RefusedUpdate, ...], tuple[RefusedUpdate, ...]]:
        """Entries of a record that uses none of the messages: those refused for `reason`, and those too late anyway."""
        usable, late = self._arrived(finished)
        usable = [*usable, *self.inbox.refinements()]
        return tuple(self.inbox.unused(ref, reason) for ref in usable), self.inbox.late(late)

    def refine(self) -> Refined | None:
        """What refinements change about the last round; None where there are none, or that round was rolled back.

        Raises:
            MailboxError: the record seals what the last round's updates weighed, and there is no key.
        """
        record = self._record
        if not record.round or not self._spec.refines(record.round - 1) or record.restored_from is not None:
            return None
        if record.hides_figures:
            raise MailboxError(
                f"What the updates of round {record.round - 1} weighed is sealed to {self._spec.sealing_key}: start "
                "the coordinator with its key file."
            )
        previews = _by_client(self.inbox.of(record.round - 1))
        refinements = _by_client(self.inbox.refinements())
        return refine(self._collector_of(record.round - 1), record, previews, refinements, self.screening())

    def _arrived(self, finished: bool) -> tuple[list[UpdateRef], list[UpdateRef]]:
        back = self._record.round if finished else max(self._spec.method.max_staleness + 1, LOOK_BACK)
        usable, late = self.inbox.updates(back)
        return usable, [*late, *self.inbox.late_refinements(back)]

    def _selected(self, round: int) -> tuple[str, ...] | None:
        return None if round == self._record.round and self._overdue() else self._records(round).selected

    def _collector_of(self, round: int) -> Collector:
        return Collector(
            self._mailbox,
            round,
            num_params=self._schema.num_params,
            base=lambda round: self._records(round).adapter_digest,
            selected=self._selected,
            usual=lambda: UsualNorm.of(self._records(round), self._adapter),
        )


def _by_client(refs: list[UpdateRef]) -> Mapping[str, UpdateRef]:
    return {ref.client_id: ref for ref in refs}


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
