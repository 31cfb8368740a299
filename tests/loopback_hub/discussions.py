"""Discussions and pull requests of a repository, with their events in the Hub's JSON."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

STATUSES = ("draft", "open", "closed", "merged")


def timestamp(date: datetime) -> str:
    """The Hub's way to write a moment: milliseconds, UTC."""
    return date.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


@dataclass
class Discussion:
    """`base` is the commit of main on which a pull request was opened; None for a plain discussion."""

    num: int
    title: str
    description: str
    author: str
    status: str
    base: str | None
    merge_commit: str | None = None
    created_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    events: list[dict[str, Any]] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __post_init__(self) -> None:
        self.comment(self.author, self.description)

    @property
    def is_pull_request(self) -> bool:
        return self.base is not None

    @property
    def ref(self) -> str:
        return f"refs/pr/{self.num}"

    def comment(self, author: str, text: str) -> dict[str, Any]:
        return self._add("comment", author, {"edited": False, "hidden": False, "latest": {"raw": text}})

    def set_status(self, author: str, status: str) -> dict[str, Any]:
        self.status = status
        return self._add("status-change", author, {"status": status})

    def set_title(self, author: str, title: str) -> dict[str, Any]:
        event = self._add("title-change", author, {"from": self.title, "to": title})
        self.title = title
        return event

    def add_commit(self, author: str, oid: str, subject: str) -> dict[str, Any]:
        return self._add("commit", author, {"oid": oid, "subject": subject})

    def summary(self, repository: str, repository_type: str) -> dict[str, Any]:
        """As an item of a list of discussions."""
        return {
            "num": self.num,
            "title": self.title,
            "status": self.status,
            "author": {"name": self.author, "type": "user"},
            "createdAt": timestamp(self.created_at),
            "isPullRequest": self.is_pull_request,
            "repo": {"name": repository, "type": repository_type},
            "numComments": sum(event["type"] == "comment" for event in self.events),
        }

    def _add(self, kind: str, author: str, data: dict[str, Any]) -> dict[str, Any]:
        with self._lock:
            event = {
                "id": f"{self.num:08x}{len(self.events):016x}",
                "type": kind,
                "author": {"name": author, "type": "user"},
                "createdAt": timestamp(datetime.now(UTC)),
                "data": data,
            }
            self.events.append(event)
        return event
