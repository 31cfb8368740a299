"""What the loopback Hub answers when it refuses: a status, the Hub's error code where it has one, and its words."""

from __future__ import annotations

from typing import Any


class HubError(Exception):
    """An answer with a status of 400 or more. `code` goes to X-Error-Code; `payload` is added to the JSON body."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        headers: dict[str, str] | None = None,
        payload: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
        self.headers, self.payload = headers or {}, payload or {}


def repository_not_found() -> HubError:
    """Also the answer for a private repository, so that strangers do not learn that it exists."""
    return HubError(404, "Repository not found", "RepoNotFound")


def revision_not_found(revision: str) -> HubError:
    return HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")


def entry_not_found(message: str = "Entry not found", commit: str | None = None) -> HubError:
    return HubError(404, message, "EntryNotFound", {"X-Repo-Commit": commit} if commit else None)
