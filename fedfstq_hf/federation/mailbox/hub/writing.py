"""Where a client writes: in a repo that follows from the address it was given, or that its own settings name.

What the mailbox says (its control file, its layout) never decides that. It only says where the coordinator reads; where
that is another place, the client refuses instead of following. Nor does it write into a repo that anybody may read, or
that something else lies in.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

from fedfstq_hf.errors import ConfigError, MailboxError, MessageError
from fedfstq_hf.federation.control import Enrolment
from fedfstq_hf.federation.mailbox.hub.files import MAX_METRICS_BYTES, HubAddress, with_metric
from fedfstq_hf.federation.mailbox.hub.global_repo import GlobalRepo
from fedfstq_hf.federation.mailbox.hub.layouts import Layout, PullRequests
from fedfstq_hf.federation.mailbox.hub.places import (
    MARKER_PATH,
    MARKER_TITLE,
    Place,
    is_message,
    open_pull_request,
    post,
    push_file,
    read_marker,
    squash,
)
from fedfstq_hf.federation.mailbox.hub.repo import HubRepo, RepoState
from fedfstq_hf.federation.storage import checked_name
from fedfstq_hf.text import printable

logger = logging.getLogger(__name__)

SQUASH_EVERY = 200
"""Messages of a client between two squashes of its repo; a repo degrades after a few thousand commits."""


class ClientWriter:
    """What a client posts, and the checks that come before.

    Args:
        global_repo: says who is enrolled.
        layout: opens the federation's layout.
        client_repo: the repo that the client's own settings name, if any.
    """

    def __init__(
        self, global_repo: GlobalRepo, layout: Callable[[], Layout], address: HubAddress, client_repo: str | None
    ) -> None:
        self._global = global_repo
        self._layout = layout
        self._address = address
        self._named = client_repo
        self._claimed: set[str] = set()
        self._kept_history: set[str] = set()

    def check(self, client_id: str) -> None:
        """Raise what posting would raise, as far as that is known before there is anything to post."""
        repo = self._decided(checked_name(client_id))
        state = repo.info()
        if state is not None:
            self._check_readers(repo, state)
            self._check_marker(repo, client_id, state)

    def post_update(
        self, round: int, client_id: str, message: bytes, *, patience: float | None, refinement: bool = False
    ) -> None:
        """Post a client's message."""
        layout, place = self._layout(), self._place(checked_name(client_id), patience)
        if place is None and isinstance(layout, PullRequests):  # also by a refinement: its preview may have been lost
            repo, find = layout.mailbox_repo(), partial(self._pull_request, layout, client_id)
            place = open_pull_request(repo, round, client_id, message, find, seconds=patience, refinement=refinement)
        if place is not None:
            post(place, round, client_id, message, seconds=patience, refinement=refinement)

    def post_metric(self, round: int, source: str, metrics: Mapping[str, Any], client_id: str) -> None:
        """Add one metric to those at the client's place."""
        place = self._place(checked_name(client_id))
        if place is None:
            raise MailboxError(f"Client {client_id!r} has no pull request yet. Post metrics after its first update.")
        path = place.metrics_path(client_id)
        try:
            file = place.repo.read(path, revision=place.revision, max_bytes=MAX_METRICS_BYTES)
        except MessageError as error:
            raise MailboxError(f"{path} of {place.repo.repo_id} is too large ({error}). Remove it first.") from None
        held = None if file is None else file.data
        data = with_metric(held, round, source, metrics, max_bytes=MAX_METRICS_BYTES)
        push_file(place, path, data, "Metrics")

    def post_attachment(self, client_id: str, name: str, data: bytes) -> None:
        """Post to the client's place."""
        place = self._place(checked_name(client_id))
        if place is None:
            raise MailboxError(f"Client {client_id!r} has no pull request yet; its first update opens one.")
        push_file(place, place.attachment_path(client_id, checked_name(name)), data, f"Attach {name}")

    # -- deciding ---------------------------------------------------------------------------------------------------

    def _place(self, client_id: str, seconds: float | None = None) -> Place | None:
        """Where the client may write now; None where its first commit opens its pull request."""
        layout, repo = self._layout(), self._decided(client_id)
        state = self._claim(repo, client_id, seconds)
        if isinstance(layout, PullRequests):
            return self._pull_request(layout, client_id)
        if layout.name == "own":
            self._squash(repo, client_id, state)
        return layout.place(client_id, Enrolment(repo=repo.repo_id))

    def _decided(self, client_id: str) -> HubRepo:
        """The repo that the client writes to, by its own settings.

        Raises:
            MailboxError: the coordinator reads another one.
            ConfigError: the federation's layout leaves nothing to choose.
        """
        layout = self._layout()
        if layout.name != "own":
            if self._named is not None and not _same(self._named, self._address.mailbox_repo):
                raise ConfigError(
                    f"This client's settings say that it writes to {self._named}, but all clients of "
                    f"{self._global.address} write to {self._address.mailbox_repo}. Leave repo out."
                )
            return layout.mailbox_repo()
        usual = self._address.client_repo(client_id)
        decided = self._named or usual
        read = self._global.control().enrolment(client_id).repo or usual
        if not _same(decided, read):
            raise MailboxError(
                f"{self._global.address} reads the messages of client {client_id!r} from {read}, but this client "
                f"writes to {decided}. Nothing was sent. Ask for `fedfstq enrol {self._global.address} {client_id} "
                f"--repo {decided}`; or, if {read} is yours and made for this federation, say repo: {read} in this "
                "client's settings."
            )
        return layout.repo(decided)

    def _pull_request(self, layout: PullRequests, client_id: str) -> Place | None:
        """The client's own pull request; None where it has none yet.

        Raises:
            MailboxError: the coordinator takes another account's for this client's.
        """
        account = layout.mailbox_repo().account()
        enrolled = self._global.control().enrolment(client_id).account
        layout.look()
        request = layout.request(client_id, enrolled)
        theirs = enrolled if request is None else request.author
        if theirs is not None and theirs != account:
            raise MailboxError(
                f"{self._global.address} reads the messages of client {client_id!r} from pull requests of the account "
                f"{printable(theirs, 60)}, but this token is of {account}. Nothing was sent. Use a token of that "
                f"account, another client_id, or ask for `fedfstq enrol {self._global.address} {client_id} --account "
                f"{account}`."
            )
        return None if request is None else Place(layout.mailbox_repo(), request.ref)

    # -- checking ---------------------------------------------------------------------------------------------------

    def _claim(self, repo: HubRepo, client_id: str, seconds: float | None) -> RepoState:
        """The repo's state, made where it is missing, once it is certain that the client may write there."""
        own = self._layout().name == "own"
        state = repo.info(seconds=seconds)
        if state is None and own:
            repo.create(private=True)
            state = repo.call("look at the new repo", lambda: _seen(repo))
        if state is None:
            raise MailboxError(
                f"There is no repo {repo.repo_id}, which the clients of {self._global.address} write to, or this token "
                "may not see it. Type `hf auth login` (or set HF_TOKEN) with an account that may read it."
            )
        self._check_readers(repo, state)
        if repo.repo_id not in self._claimed:
            if not self._check_marker(repo, client_id, state):
                marker = self._layout().marker(client_id)
                push_file(Place(repo, "main"), MARKER_PATH, marker.to_json(), MARKER_TITLE)
            self._claimed.add(repo.repo_id)
        return state

    def _check_readers(self, repo: HubRepo, state: RepoState) -> None:
        if not _same(state.repo_id, repo.repo_id):
            raise MailboxError(
                f"{repo.repo_id} was renamed: what is sent there would go to {printable(state.repo_id)}. Nothing was "
                "sent. Name a repo by `repo` in this client's settings."
            )
        if state.private:
            return
        if self._layout().name == "own":
            raise MailboxError(
                f"{repo.repo_id} is public: everybody could read this client's messages. Nothing was sent. Type `hf "
                f"repos settings {repo.repo_id} --private`, or name a private repo by `repo` in this client's settings."
            )
        if self._named is None:
            raise MailboxError(
                f"{repo.repo_id}, which all clients of {self._global.address} write to, is public: everybody could "
                f"read this client's messages. Nothing was sent. If that is meant, say repo: {repo.repo_id} in this "
                "client's settings."
            )

    def _check_marker(self, repo: HubRepo, client_id: str, state: RepoState) -> bool:
        """Whether the repo has the client's marker. False: it has none, and the client may put one there."""
        layout = self._layout()
        marker = layout.marker(client_id)
        there = read_marker(repo) if MARKER_PATH in state.files else None
        if there is not None:
            if there.same(marker):
                return True
            raise MailboxError(
                f"{repo.repo_id} belongs to {there}; this is {marker}. Nothing was sent. Give this client another "
                "client_id, or name a repo of its own by `repo` in its settings."
            )
        foreign = [path for path in state.files if path != ".gitattributes"]
        if layout.name != "own":
            raise MailboxError(
                f"{repo.repo_id} was not made for {self._global.address}: it has no {MARKER_PATH}. Nothing was sent. "
                "Ask who runs the federation."
            )
        if foreign and self._named is None:
            raise MailboxError(
                f"{repo.repo_id} is not this client's: it holds {printable(foreign[0], 80)} and no {MARKER_PATH}. "
                "Nothing was sent. Give this client another client_id; or, if messages shall lie beside what is "
                f"there, say repo: {repo.repo_id} in its settings."
            )
        return False

    def _squash(self, repo: HubRepo, client_id: str, state: RepoState) -> None:
        """Squash the client's own repo every so many of its messages: all earlier ones are used or late by now."""
        messages = sum(map(is_message, state.files))
        if not messages or messages % SQUASH_EVERY or repo.repo_id in self._kept_history:
            return
        with suppress(MailboxError):  # it may wait for the next time
            if not squash(repo, self._layout().marker(client_id), account=repo.account()):
                self._kept_history.add(repo.repo_id)


def _same(one: str, other: str) -> bool:
    return one.casefold() == other.casefold()  # as the Hub takes them


def _seen(repo: HubRepo) -> RepoState:
    state = repo.info()
    if state is None:
        raise ConnectionError("it does not show yet")  # what is read back may lag: look again
    return state
