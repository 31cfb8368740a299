"""The requests a loopback Hub has answered, for tests to count."""

from __future__ import annotations

import re
import threading
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Entry:
    """One request. `status` 0: the connection was closed without an answer. Sizes are of the bodies, in bytes."""

    time: float  # seconds since the epoch, when the answer was ready
    seconds: float
    origin: str  # "hub" or "storage"
    method: str
    path: str  # raw, with the query
    status: int
    user: str | None
    fault: str | None
    received: int
    sent: int


class RequestLog:
    """Append-only. Filters: any field of `Entry` by its value, except `path`: a regular expression, searched."""

    def __init__(self) -> None:
        self._entries: list[Entry] = []
        self._lock = threading.Lock()

    def add(self, entry: Entry) -> None:
        with self._lock:
            self._entries.append(entry)

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()

    def entries(self, path: str | None = None, **equal: Any) -> list[Entry]:
        """The entries that match, oldest first."""
        with self._lock:
            entries = list(self._entries)
        return [
            entry
            for entry in entries
            if (path is None or re.search(path, entry.path))
            and all(getattr(entry, name) == value for name, value in equal.items())
        ]

    def count(self, path: str | None = None, **equal: Any) -> int:
        return len(self.entries(path, **equal))

    def per_user(self, path: str | None = None, **equal: Any) -> dict[str, int]:
        """Requests of each user; callers without a token count as ""."""
        return dict(Counter(entry.user or "" for entry in self.entries(path, **equal)))

    def as_json(self, path: str | None = None, **equal: Any) -> list[dict[str, Any]]:
        return [asdict(entry) for entry in self.entries(path, **equal)]
