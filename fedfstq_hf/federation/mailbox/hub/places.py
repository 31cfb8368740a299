"""Places: what one client may write. Paths there, whose a place is, how files are sent, and squashing its history.

A marker file says which federation and client made a repo; files and commits say whether others wrote there. A client's
token may write more repos than those of the federation. So what a mailbox says about a repo is not enough to write
there, and nothing is squashed or deleted in a repo that somebody else has put anything into.

Files have unique paths and commits no parent, so that writers cannot undo one another.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass

from huggingface_hub import CommitOperationAdd
from huggingface_hub.errors import HfHubHTTPError

from fedfstq_hf.errors import MailboxError, MessageError, UpdateConflictError
from fedfstq_hf.federation.mailbox.hub.files import dump
from fedfstq_hf.federation.mailbox.hub.http import TIDYING_SECONDS, Outcome, diagnose
from fedfstq_hf.federation.mailbox.hub.repo import HubRepo, additions, has_digest
from fedfstq_hf.federation.mailbox.protocol import ATTACHMENTS
from fedfstq_hf.federation.storage import is_name
from fedfstq_hf.text import parse_object, printable

logger = logging.getLogger(__name__)

MARKER_PATH = ".fedfstq.json"
"""Says which federation, and which client of it, a repo belongs to."""

PULL_REQUEST_TITLE = "Updates of client "
"""Of the pull request whose first commit is a client's first message."""

_ROUND = "[0-9]{6,}"
_CLIENT = "[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
_ATTACHED = "|".join(map(re.escape, ATTACHMENTS))
_OURS_ANYWHERE = rf"\.gitattributes|{re.escape(MARKER_PATH)}"
_OURS = {
    False: re.compile(rf"{_OURS_ANYWHERE}|(rounds|refinements)/{_ROUND}\.safetensors|metrics\.json|{_ATTACHED}"),
    True: re.compile(
        rf"{_OURS_ANYWHERE}|rounds/{_ROUND}/(deltas|refinements)/{_CLIENT}\.safetensors"
        rf"|metrics/{_CLIENT}\.json|attachments/{_CLIENT}/({_ATTACHED})"
    ),
}
_MESSAGE = re.compile(rf"(rounds|refinements)/{_ROUND}\.safetensors")

MARKER_TITLE = "Made for a federation"
SQUASH_TITLE = "Earlier messages"
_FIRST_TITLE = "initial commit"  # the Hub's own, of a new repo
_TITLES = re.compile(rf"{MARKER_TITLE}|Round [0-9]+(, refinement)?|Metrics|Attach [A-Za-z0-9._-]+|Rounds before [0-9]+")
_FORMAT = 1
_MAX_BYTES = 1000


def round_folder(round: int, refinements: bool = False) -> str:
    """Where a shared repo has the messages of a round, or their refinements."""
    return f"rounds/{round:06d}/{'refinements' if refinements else 'deltas'}"


def is_ours(path: str, *, shared: bool) -> bool:
    """Whether this package writes such a file into a client's repo, or into one that clients share."""
    return _OURS[shared].fullmatch(path) is not None


def is_message(path: str) -> bool:
    """Whether a file of a client's own repo is one of its messages."""
    return _MESSAGE.fullmatch(path) is not None


@dataclass(frozen=True)
class Place:
    """What one client may write: a branch or pull request of a repo, `shared` with others or its own."""

    repo: HubRepo
    revision: str
    shared: bool = False

    def update_path(self, round: int, client_id: str, refinement: bool = False) -> str:
        """Of the client's message for a round, or its second one."""
        if self.shared:
            return f"{round_folder(round, refinement)}/{client_id}.safetensors"
        return f"{'refinements' if refinement else 'rounds'}/{round:06d}.safetensors"

    def metrics_path(self, client_id: str) -> str:
        """Of the metrics that the client posted."""
        return f"metrics/{client_id}.json" if self.shared else "metrics.json"

    def attachment_path(self, client_id: str, name: str) -> str:
        """Of a file that the client sends beside its messages."""
        return f"attachments/{client_id}/{name}" if self.shared else name


# -- sending -------------------------------------------------------------------------------------------------------


def push_file(place: Place, path: str, data: bytes, message: str, *, seconds: float | None = None) -> None:
    """Commit one file to a place, whatever else is committed there meanwhile; unchanged content makes no commit.

    Raises:
        MailboxUnavailableError: it could not be done within `seconds`; whether it was done is then unknown.
    """
    pending: list[CommitOperationAdd] = []

    def request() -> None:
        if not pending:
            pending.extend(additions({path: data}))
        try:
            place.repo.commit_once(pending, message, revision=place.revision)
        except Exception as error:
            # After a busy answer the same upload is sent again, in one request. After a lost one it has to be asked
            # anew whether the file is there, or there would be a second commit.
            if diagnose(error).outcome is not Outcome.BUSY:
                pending.clear()
            raise

    place.repo.call(f"send {path} to", request, seconds=seconds)


def post(
    place: Place, round: int, client_id: str, data: bytes, *, seconds: float | None = None, refinement: bool = False
) -> None:
    """Post a message at its path; the same bytes again change nothing.

    Raises:
        UpdateConflictError: other bytes are there already.
    """
    path = place.update_path(round, client_id, refinement)
    there = place.repo.state(path, revision=place.revision, seconds=seconds)
    if there is not None:
        if there.size != len(data) or not has_digest(data, there.etag):
            raise UpdateConflictError(
                f"Client {client_id!r} already posted another message for round {round} to {place.repo.repo_id}. Is a "
                "second process running under the same client_id? Give each client an id and a state folder of its own."
            )
        return
    push_file(place, path, data, f"Round {round}{', refinement' if refinement else ''}", seconds=seconds)


def open_pull_request(
    repo: HubRepo,
    round: int,
    client_id: str,
    data: bytes,
    find: Callable[[], Place | None],
    *,
    seconds: float | None = None,
    refinement: bool = False,
) -> Place | None:
    """Open a client's pull request with its first message.

    Args:
        find: looks for the pull request, since an answer may be lost.

    Returns:
        The pull request that was there already, to which nothing was sent; None if this one was opened.
    """

    def request() -> Place | None:
        place = find()
        if place is not None:
            return place
        path = Place(repo, "main").update_path(round, client_id, refinement)
        try:
            repo.api.create_commit(
                repo.repo_id, additions({path: data}), commit_message=PULL_REQUEST_TITLE + client_id, create_pr=True
            )
        except HfHubHTTPError as error:
            if error.response is not None and error.response.status_code == 412:
                raise ConnectionError("the repo was changed meanwhile") from None
            raise
        return None

    return repo.call("open a pull request to", request, seconds=seconds)


# -- whose it is ---------------------------------------------------------------------------------------------------


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


def squash(repo: HubRepo, marker: Marker, *, account: str | None) -> bool:
    """Replace the history of a repo that has only this package's work in it by one commit; says whether it was done.

    Args:
        account: the only one that wrote there, None where all clients do.

    Raises:
        MailboxError: the Hub did not do it.
    """
    reason = strangers_work(repo, marker, account)
    if reason is not None:
        logger.warning("The history of %s is kept as it is: %s.", repo.repo_id, reason)
        return False
    repo.call(
        "squash the history of",
        lambda: repo.api.super_squash_history(repo.repo_id, commit_message=SQUASH_TITLE),
        seconds=TIDYING_SECONDS,
    )
    return True
