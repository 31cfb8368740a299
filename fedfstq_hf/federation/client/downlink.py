"""What a client downloads to hold Θ_t: the frames since the adapter it holds or since a keyframe, or the plain file."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from fedfstq_hf.errors import FedFSTQError, MailboxError, MailboxUnavailableError
from fedfstq_hf.federation import adapter_file, frames, storage
from fedfstq_hf.federation.client.session import ClientSession
from fedfstq_hf.federation.mailbox.protocol import ADAPTER_FILE, FRAME_FILE, Mailbox
from fedfstq_hf.federation.record import KEYFRAME, Frame, RoundRecord
from fedfstq_hf.federation.scaffold import read_variate
from fedfstq_hf.text import printable

logger = logging.getLogger(__name__)

HELD_FILE = "held.safetensors"
"""In a client's state folder: the adapter it holds, so that a restart downloads nothing twice."""
_HELD, _ROUND, _INITIAL = "adapter", "round", "initial"
_MAX_HEADER = 1000


class Downlink:
    """Reads a mailbox's adapters for one client, and keeps the newest, across restarts where the session has a folder.

    Args:
        mailbox: where the federation lives.
        session: the client's.
        record: round -> its record.

    Attributes:
        num_bytes: of adapters, frames and control variates that were downloaded.
    """

    def __init__(self, mailbox: Mailbox, session: ClientSession, record: Callable[[int], RoundRecord]) -> None:
        self.num_bytes = 0
        self._mailbox = mailbox
        self._spec, self._num_variate = session.spec, session.schema.num_params
        self._schema = session.trained.whole
        self._record = record
        self._most_bytes = adapter_file.most_bytes(self._schema)
        self._file = None if session.folder is None else session.folder / HELD_FILE
        self._initial: Tensor | None = None
        self._held: tuple[int, Tensor] | None = None
        if self._file is not None and self._file.exists():
            self._restore(self._file)

    def adapter(self, record: RoundRecord) -> Tensor:
        """Θ of a round, (num_params,) float32, by the cheapest way from what is at hand."""
        if self._held is not None and self._is(self._held[1], record):
            return self._held[1]
        adapter = self._drawn(record) if record.round == 0 else self._followed(record)
        if adapter is None:
            data = self._read(record.round, ADAPTER_FILE, self._most_bytes)
            state = adapter_file.load(data, expected_sha256=record.adapter_sha256, schema=self._schema)
            adapter = self._schema.flatten(state)
        if record.round == 0 and self._spec.downlink.keyframe is not None:
            self._initial = adapter
        self._keep(record.round, adapter)
        return adapter

    def variate(self, record: RoundRecord) -> Tensor | None:
        """The server's control variate of a round, None where the federation has none."""
        self.num_bytes += record.variate_bytes
        return read_variate(self._mailbox, record, self._spec, self._num_variate)

    def _followed(self, record: RoundRecord) -> Tensor | None:
        """Θ of a round by frames; None where there is no such way, a dearer one, or one that does not check."""
        held = None if self._held is None else self._held[0]
        path = record.path_from(held)
        if path.frames and not self._begins_at(path.frames[0], held):
            path = record.path_from(held, initial_bytes=self._initial_bytes())
        if not path.frames:
            return None
        try:
            adapter = self._start(path.frames[0], held)
            for frame in path.frames:
                data = self._read(frame.round, FRAME_FILE, min(frame.num_bytes, self._most_bytes))
                adapter = frames.apply(data, frame, adapter, self._spec, self._schema)
            if not self._is(adapter, record):
                raise MailboxError("they lead to another adapter")
        except MailboxUnavailableError:
            raise
        except FedFSTQError as error:
            logger.warning(
                "The frames on the way to round %d do not check (%s); the whole adapter is downloaded instead.",
                record.round,
                printable(error, 300),
            )
            return None
        return adapter

    def _start(self, first: Frame, held: int | None) -> Tensor:
        """What the first frame of a path starts from."""
        if self._held is not None and self._begins_at(first, held):
            return self._held[1]
        if self._initial is None:
            record = self._record(0)
            self._initial, downloaded = frames.initial_adapter(self._mailbox, record, self._spec, self._schema)
            self.num_bytes += downloaded
        return self._initial

    @staticmethod
    def _begins_at(first: Frame, held: int | None) -> bool:
        return first.kind != KEYFRAME and first.round - 1 == held

    def _initial_bytes(self) -> int:
        """What Θ_0 still costs this client."""
        if self._initial is None:
            self._initial = self._drawn(self._record(0))
        return self._record(0).adapter_bytes if self._initial is None else 0

    def _drawn(self, record: RoundRecord) -> Tensor | None:
        vector = frames.drawn(self._schema, self._spec.seed)
        return vector if vector is not None and self._is(vector, record) else None

    def _is(self, adapter: Tensor, record: RoundRecord) -> bool:
        return self._schema.digest(adapter) == record.adapter_digest

    def _read(self, round: int, name: str, max_bytes: int) -> bytes:
        data = self._mailbox.read(round, name, max_bytes=max_bytes)
        self.num_bytes += len(data)
        return data

    def _keep(self, round: int, adapter: Tensor) -> None:
        self._held = round, adapter
        if self._file is None:
            return
        tensors = {_HELD: adapter, _ROUND: torch.tensor(round)}
        if self._initial is not None and frames.drawn(self._schema, self._spec.seed) is None:
            tensors[_INITIAL] = self._initial
        storage.replace_file(self._file, save(tensors), durable=False)

    def _restore(self, file: Path) -> None:
        """What was held at the last stop; a file that is damaged costs a download, as digests are checked anyway."""
        try:
            data = storage.read_file(file, max_bytes=2 * self._most_bytes, below=file.parent)
            tensors = adapter_file.load_tensors(data, str(file), max_header=_MAX_HEADER, error=MailboxError)
            shape = (self._schema.num_params,)
            if tensors[_HELD].shape == shape:
                self._held = int(tensors[_ROUND]), tensors[_HELD]
            if _INITIAL in tensors and self._is(tensors[_INITIAL], self._record(0)):
                self._initial = tensors[_INITIAL]
        except (MailboxError, OSError, KeyError, ValueError) as error:
            logger.warning("What this client held is downloaded again: %s", printable(error, 300))
