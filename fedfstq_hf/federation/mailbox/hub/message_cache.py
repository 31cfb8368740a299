"""Messages on disk while their round is open: a round reads each twice, and must hold only one in memory."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable
from pathlib import Path

from fedfstq_hf.federation.mailbox.protocol import UpdateRef


class MessageCache:
    """Bytes by the reference they were listed under, in a temporary folder that goes with the process.

    So the second reading is the first one's bytes, whatever the sender did in between.
    """

    def __init__(self) -> None:
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._names: dict[UpdateRef, str] = {}

    def get(self, ref: UpdateRef) -> bytes | None:
        """What was kept of a message."""
        path = self._path(ref)
        return path.read_bytes() if path is not None and path.is_file() else None

    def keep(self, ref: UpdateRef, data: bytes) -> None:
        """Keep a message that was read."""
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="fedfstq-")
        self._names[ref] = hashlib.sha256(data).hexdigest()
        (Path(self._folder.name) / self._names[ref]).write_bytes(data)

    def keep_only(self, wanted: Iterable[UpdateRef]) -> None:
        """Remove all others."""
        self._names = {ref: self._names[ref] for ref in wanted if ref in self._names}
        if self._folder is not None:
            kept = set(self._names.values())
            for path in Path(self._folder.name).iterdir():
                if path.name not in kept:
                    path.unlink(missing_ok=True)

    def _path(self, ref: UpdateRef) -> Path | None:
        if self._folder is None or ref not in self._names:
            return None
        return Path(self._folder.name) / self._names[ref]
