"""What a client downloads to hold Θ_t: the packed changes since the adapter it holds, or the whole adapter file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fedfstq_hf.codec import CodecContext, Schema, get_codec, message
from fedfstq_hf.errors import FedFSTQError, MailboxError
from fedfstq_hf.federation import adapter_file
from fedfstq_hf.federation.client.session import ClientSession
from fedfstq_hf.federation.mailbox.protocol import ADAPTER_FILE, UPDATE_FILE, Mailbox
from fedfstq_hf.federation.record import RoundRecord
from fedfstq_hf.federation.scaffold import read_variate


@dataclass(frozen=True)
class Download:
    """`changes` are the rounds whose packed change is applied in order; None stands for the whole adapter file.

    `num_bytes` counts the control variate, where the round has one, too.
    """

    changes: tuple[int, ...] | None
    num_bytes: int


def cheapest_download(held: int | None, wanted: int, record: Callable[[int], RoundRecord]) -> Download:
    """The cheaper of the two ways from round `held` (None: nothing) to round `wanted`, in bytes."""
    whole, variate = record(wanted).adapter_bytes, record(wanted).variate_bytes
    if held is not None and held <= wanted:
        rounds, total = tuple(range(held + 1, wanted + 1)), 0
        for round in rounds:
            size = record(round).update_bytes
            total += whole if size is None else size
            if total >= whole:
                return Download(None, whole + variate)
        return Download(rounds, total + variate)
    return Download(None, whole + variate)


def apply_change(data: bytes, base: RoundRecord, adapter: Tensor, record: RoundRecord, schema: Schema) -> Tensor:
    """Θ_{t+1} from Θ_t and the packed global change; exact, which the record's digest proves.

    Raises:
        MailboxError: the change is damaged, or does not lead from `base` to `record`.
    """
    header, payload = message.unpack(data)
    if header.base != base.adapter_digest:
        raise MailboxError(f"The packed change of round {record.round} starts from another adapter.")
    update = get_codec(header.codec).decode(payload, schema, CodecContext(round=record.round))
    changed = schema.flatten(schema.unflatten(adapter + update.to_dense()))  # rounded as in the file
    if schema.digest(changed) != record.adapter_digest:
        raise MailboxError(
            f"The packed change of round {record.round} does not give the adapter that its record names."
        )
    return changed


class Downlink:
    """Reads a mailbox's adapters for one client, and keeps the newest.

    Args:
        mailbox: where the federation lives.
        session: the client's.
        record: round -> its record.

    Attributes:
        num_bytes: that were downloaded.
    """

    def __init__(self, mailbox: Mailbox, session: ClientSession, record: Callable[[int], RoundRecord]) -> None:
        self.num_bytes = 0
        self._mailbox = mailbox
        self._spec, self._num_variate = session.spec, session.schema.num_params
        self._schema = session.trained.whole
        self._record = record
        self._most_bytes = adapter_file.most_bytes(self._schema)
        self._held: tuple[RoundRecord, Tensor] | None = None

    def adapter(self, record: RoundRecord) -> Tensor:
        """Θ of a round, (num_params,) float32, by the cheaper way from what is at hand."""
        adapter = self._followed(record)
        if adapter is None:
            data = self._read(record.round, ADAPTER_FILE)
            state = adapter_file.load(data, expected_sha256=record.adapter_sha256, schema=self._schema)
            adapter = self._schema.flatten(state)
        self._held = (record, adapter)
        return adapter

    def variate(self, record: RoundRecord) -> Tensor | None:
        """The server's control variate of a round, None where the federation has none."""
        self.num_bytes += record.variate_bytes
        return read_variate(self._mailbox, record, self._spec, self._num_variate)

    def _followed(self, record: RoundRecord) -> Tensor | None:
        """Θ of a round by the changes since the one that is held; None where there is no such way, or a dearer one."""
        held = self._held
        way = cheapest_download(held[0].round if held else None, record.round, self._record)
        if held is None or way.changes is None:
            return None
        base, adapter = held
        try:
            for round in way.changes:
                following = self._record(round)
                adapter = apply_change(self._read(round, UPDATE_FILE), base, adapter, following, self._schema)
                base = following
        except FedFSTQError:  # a damaged change only costs the download of the whole
            return None
        return adapter

    def _read(self, round: int, name: str) -> bytes:
        data = self._mailbox.read(round, name, max_bytes=self._most_bytes)
        self.num_bytes += len(data)
        return data
