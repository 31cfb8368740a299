"""Posting: a client's push loop. A unique path and no parent commit, so that writers cannot undo one another."""

from __future__ import annotations

from collections.abc import Callable

from huggingface_hub import CommitOperationAdd
from huggingface_hub.errors import HfHubHTTPError

from fedfstq_hf.errors import UpdateConflictError
from fedfstq_hf.federation.mailbox.hub.places import PULL_REQUEST_TITLE, Place
from fedfstq_hf.federation.mailbox.hub.repo import HubRepo, additions, has_digest
from fedfstq_hf.federation.mailbox.hub.waiting import Outcome, diagnose


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
