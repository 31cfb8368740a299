"""Round records read from a mailbox, the most recent kept: they never change, and may name thousands of clients."""

from __future__ import annotations

from fedfstq_hf.errors import MailboxError
from fedfstq_hf.federation.mailbox.protocol import RECORD_FILE, Mailbox
from fedfstq_hf.federation.record import RoundRecord
from fedfstq_hf.federation.sealed_figures import open_figures
from fedfstq_hf.federation.server.screening import Unseal
from fedfstq_hf.federation.signed_records import check_record
from fedfstq_hf.federation.spec import FederationSpec

_KEPT = 64


class Records:
    """`records(round)` is the round's record, signed as the spec demands.

    unseal: opens what a sealed federation's records hide, for the coordinator.
    """

    def __init__(self, mailbox: Mailbox, spec: FederationSpec, unseal: Unseal | None = None) -> None:
        self._mailbox = mailbox
        self._spec = spec
        self._unseal = unseal
        self._kept: dict[int, RoundRecord] = {}

    def __call__(self, round: int) -> RoundRecord:
        """Raises `MailboxError` if there is no such round, or its record cannot be read or is forged."""
        if round not in self._kept:
            record = RoundRecord.from_json(self._mailbox.read(round, RECORD_FILE))
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
