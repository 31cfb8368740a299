"""Whose a repo is: a marker file says which federation and client made it; files and commits say whether others wrote.

A client's token may write more repos than those of the federation. So what a mailbox says about a repo is not enough to
write there, and nothing is squashed or deleted in a repo that somebody else has put anything into.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from fedfstq_hf.errors import MailboxError, MessageError
from fedfstq_hf.federation.mailbox.hub.json_files import dump
from fedfstq_hf.federation.mailbox.hub.places import MARKER_PATH, is_ours
from fedfstq_hf.federation.mailbox.hub.repo import HubRepo
from fedfstq_hf.federation.mailbox.protocol import is_name
from fedfstq_hf.federation.untrusted import parse_object
from fedfstq_hf.text import printable

MARKER_TITLE = "Made for a federation"
SQUASH_TITLE = "Earlier messages"
_FIRST_TITLE = "initial commit"  # the Hub's own, of a new repo
_TITLES = re.compile(rf"{MARKER_TITLE}|Round [0-9]+(, refinement)?|Metrics|Attach [A-Za-z0-9._-]+|Rounds before [0-9]+")
_FORMAT = 1
_MAX_BYTES = 1000


@dataclass(frozen=True)
class Marker:
    """What a marker file says: the federation's `org/name`, and the client whose repo it is, None where all share it.

    The Hub takes names of repos in either case, so they are compared without it.
    """

    federation: str
    client_id: str | None = None

    def __str__(self) -> str:
        who = "all clients" if self.client_id is None else f"client {self.client_id}"
        return f"{who} of hf://{self.federation}"

    def to_json(self) -> bytes:
        """The marker file."""
        return dump({"format": _FORMAT, "federation": self.federation, "client_id": self.client_id})

    def same(self, other: Marker) -> bool:
        """Whether both name the same client of the same federation."""
        return (self.federation.casefold(), self.client_id) == (other.federation.casefold(), other.client_id)


def read_marker(repo: HubRepo, *, revision: str = "main", seconds: float | None = None) -> Marker | None:
    """The repo's marker, None where it has none.

    Raises:
        MailboxError: the file is no marker.
    """
    try:
        file = repo.read(MARKER_PATH, revision=revision, max_bytes=_MAX_BYTES, seconds=seconds)
    except MessageError as error:
        raise MailboxError(f"{MARKER_PATH} of {repo.repo_id} is no marker: {error}") from None
    if file is None:
        return None
    fields = parse_object(file.data, f"{MARKER_PATH} of {repo.repo_id}", max_bytes=_MAX_BYTES)
    federation, client_id = fields.get("federation"), fields.get("client_id")
    known = client_id is None or (isinstance(client_id, str) and is_name(client_id))
    if fields.get("format") != _FORMAT or not isinstance(federation, str) or not known:
        raise MailboxError(
            f"{MARKER_PATH} of {repo.repo_id} is no marker: expected format {_FORMAT}, a federation and a client_id."
        )
    return Marker(printable(federation), client_id)


def strangers_work(repo: HubRepo, marker: Marker, account: str | None) -> str | None:
    """What in the repo is not this package's: a file, a commit, another's marker. None if there is nothing.

    Args:
        account: the only one whose commits are ours; None where many clients write.
    """
    found = repo.info()
    if found is None:
        return "it is not there"
    foreign = [path for path in found.files if not is_ours(path, shared=marker.client_id is None)]
    if foreign:
        return f"it holds {printable(foreign[0], 80)}"
    present = read_marker(repo)
    if present is None or not present.same(marker):
        return "it has no marker of its own" if present is None else f"it belongs to {present}"
    commits = repo.call("list the commits of", lambda: repo.api.list_repo_commits(repo.repo_id))
    others = [commit for commit in commits if account is not None and set(commit.authors) != {account}]
    if others:
        return f"{printable(', '.join(others[0].authors), 80)} committed {printable(others[0].title, 80)}"
    made = [commit.title for commit in reversed(commits)]
    start = 1 if made[:1] == [SQUASH_TITLE] else 2 if made[:2] == [_FIRST_TITLE, MARKER_TITLE] else 0
    if not start:
        return "it was not made by this package"
    unknown = [title for title in made[start:] if not _TITLES.fullmatch(title)]
    return f"it has the commit {printable(unknown[0], 80)}" if unknown else None
