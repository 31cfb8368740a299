"""Messages on disk while their round is open: a round reads each twice, and must hold only one in memory."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Collection
from pathlib import Path

_SHA256 = re.compile(r"[0-9a-f]{64}")


class MessageCache:
    """Bytes by their sha256, in a temporary folder that goes with the process. Without a digest nothing is kept."""

    def __init__(self) -> None:
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def get(self, sha256: str) -> bytes | None:
        """What was kept under a digest."""
        path = self._path(sha256)
        return path.read_bytes() if path is not None and path.is_file() else None

    def keep(self, sha256: str, data: bytes) -> None:
        """Keep `data`, whose digest the caller has checked."""
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="fedfstq-")
        path = self._path(sha256)
        if path is not None:
            path.write_bytes(data)

    def keep_only(self, wanted: Collection[str]) -> None:
        """Remove all others."""
        if self._folder is not None:
            for path in Path(self._folder.name).iterdir():
                if path.name not in wanted:
                    path.unlink(missing_ok=True)

    def _path(self, sha256: str) -> Path | None:
        if self._folder is None or not _SHA256.fullmatch(sha256):
            return None
        return Path(self._folder.name) / sha256
