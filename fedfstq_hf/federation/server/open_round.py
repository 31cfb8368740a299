"""The open round as the coordinator finds it: who was heard, what is used, and what is too late for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import Tensor

from fedfstq_hf.errors import MailboxError
from fedfstq_hf.federation.control import Control, read_control
from fedfstq_hf.federation.keys import Unseal
from fedfstq_hf.federation.mailbox.protocol import Mailbox, UpdateRef
from fedfstq_hf.federation.record import RefusedUpdate, RoundRecord
from fedfstq_hf.federation.server.clipping import Usual
from fedfstq_hf.federation.server.collecting import Collected, Collector
from fedfstq_hf.federation.server.inbox import LOOK_BACK, Inbox
from fedfstq_hf.federation.server.refining import Refined, refine
from fedfstq_hf.federation.server.screening import Screening
from fedfstq_hf.federation.signed_records import Records
from fedfstq_hf.federation.spec import FederationSpec
from fedfstq_hf.federation.trained_part import TrainedPart


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
    ) -> None:
        self._mailbox = mailbox
        self._spec = spec
        self._record = record
        self._records = records
        self._schema = trained.schema
        self._adapter = adapter
        self._unseal = unseal
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

    def _collector_of(self, round: int) -> Collector:
        return Collector(
            self._mailbox,
            round,
            num_params=self._schema.num_params,
            base=lambda round: self._records(round).adapter_digest,
            selected=lambda round: self._records(round).selected,
            usual=lambda: Usual.of(self._records(round), self._adapter),
        )


def _by_client(refs: list[UpdateRef]) -> Mapping[str, UpdateRef]:
    return {ref.client_id: ref for ref in refs}
