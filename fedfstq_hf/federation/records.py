"""Round records read from a mailbox, the most recent kept: they never change, and may name thousands of clients."""

from __future__ import annotations

from fedfstq_hf.errors import MailboxError
from fedfstq_hf.federation.mailbox import RECORD_FILE, Mailbox
from fedfstq_hf.federation.record import RoundRecord

_KEPT = 64


class Records:
    """`records(round)` is the round's record."""

    def __init__(self, mailbox: Mailbox) -> None:
        self._mailbox = mailbox
        self._kept: dict[int, RoundRecord] = {}

    def __call__(self, round: int) -> RoundRecord:
        """Raises `MailboxError` if there is no such round, or its record cannot be read."""
        if round not in self._kept:
            record = RoundRecord.from_json(self._mailbox.read(round, RECORD_FILE))
            if record.round != round:
                raise MailboxError(
                    f"{self._mailbox.address} holds the record of round {record.round} where that of round {round} "
                    "belongs. Restore it from a backup."
                )
            self.add(record)
        return self._kept[round]

    def add(self, record: RoundRecord) -> None:
        """Keep a record that is known already."""
        self._kept[record.round] = record
        while len(self._kept) > _KEPT:
            del self._kept[next(iter(self._kept))]
