"""Where clients' messages lie on the Hub: one private repo each, one shared repo, or one pull request each.

A layout knows the places of all clients, for whoever reads them. Where a client itself writes is its own decision: see
`writing`.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from itertools import islice

from huggingface_hub import CommitOperationDelete, HfApi
from huggingface_hub.hf_api import RepoFile

from fedfstq_hf.errors import MailboxError
from fedfstq_hf.federation.control import Enrolment
from fedfstq_hf.federation.mailbox.hub.files import HubAddress
from fedfstq_hf.federation.mailbox.hub.http import TIDYING_SECONDS, Patience
from fedfstq_hf.federation.mailbox.hub.places import (
    MARKER_PATH,
    MARKER_TITLE,
    PULL_REQUEST_TITLE,
    Marker,
    Place,
    is_ours,
    push_file,
    read_marker,
    round_folder,
    squash,
)
from fedfstq_hf.federation.mailbox.hub.repo import HubRepo
from fedfstq_hf.federation.mailbox.protocol import UpdateRef
from fedfstq_hf.federation.storage import is_name

logger = logging.getLogger(__name__)

_OPEN = ("open", "draft")
_MOST_REQUESTS = 20_000  # pull requests that are looked through; anybody who can read the repo may open some
_CLOSING_SECONDS = 10.0
TIDY_EVERY = 10
"""Rounds between two deletions of old messages in a shared repo."""
_SQUASH_COMMITS = 500


class Layout(ABC):
    """Places of clients in a federation's repos."""

    name: str

    def __init__(self, address: HubAddress, api: HfApi, patience: Patience) -> None:
        self.address = address
        self.api = api
        self._patience = patience

    @abstractmethod
    def found(self, *, private: bool) -> None:
        """Make what all clients share, when the federation is founded."""

    def look(self) -> None:  # noqa: B027  (most layouts know the places beforehand)
        """Whoever asks for places next wants to know them as they are now."""

    @abstractmethod
    def place(self, client_id: str, enrolment: Enrolment) -> Place | None:
        """Where a client's messages are read; None while it has not written anything that would tell."""

    @abstractmethod
    def marker(self, client_id: str) -> Marker:
        """What the marker of the client's place says, if it is one."""

    @abstractmethod
    def clients(self) -> list[str]:
        """Clients that have a place, where nobody is enrolled by name."""

    def list_folder(self, round: int, refinements: bool = False) -> list[UpdateRef] | None:
        """All messages of a round in one request; None where each client's place must be looked at."""
        return None

    def tidy(self, round: int, *, clients: int, keep_rounds: int) -> None:  # noqa: B027
        """After publishing `round`: remove messages that nobody asks for any more, where the layout keeps them."""

    def close(self) -> None:  # noqa: B027
        """After the last round: leave nothing open."""

    def repo(self, repo_id: str) -> HubRepo:
        """A repo on the federation's Hub."""
        return HubRepo(repo_id, self.api, self._patience)

    def mailbox_repo(self) -> HubRepo:
        """The repo that clients share, in the layouts that have one."""
        return self.repo(self.address.mailbox_repo)

    def _found_shared(self, *, private: bool) -> None:
        """Create the shared repo with its marker, or go on with one that was created for this federation before."""
        repo, marker = self.mailbox_repo(), Marker(self.address.repo_id)
        repo.create(private=private)
        there = read_marker(repo)
        if there is not None and there.same(marker):
            return
        held = repo.list("")
        if there is not None or any(entry.path != ".gitattributes" for entry in held):
            raise MailboxError(
                f"The repo {repo.repo_id} already holds something else"
                f"{f': it belongs to {there}' if there is not None else ''}. Give the federation another name, or "
                "remove that repo first."
            )
        push_file(Place(repo, "main", shared=True), MARKER_PATH, marker.to_json(), MARKER_TITLE)


class OwnRepos(Layout):
    """One private repo per client, `ORG/RUN-CLIENT`: nobody can touch another's, each has a commit quota of its own."""

    name = "own"

    def found(self, *, private: bool) -> None:
        """Nothing: each client makes its repo."""

    def place(self, client_id: str, enrolment: Enrolment) -> Place:
        """The client's repo, whether it exists yet or not."""
        return Place(self.repo(enrolment.repo or self.address.client_repo(client_id)), "main")

    def marker(self, client_id: str) -> Marker:
        """Each repo is one client's."""
        return Marker(self.address.repo_id, client_id)

    def clients(self) -> list[str]:
        """Clients whose repos the Hub lists under the federation's name. Some may be another federation's."""
        prefix = f"{self.address.name}-"
        models = self.repo(self.address.repo_id).call(
            "list the clients of", lambda: list(self.api.list_models(author=self.address.org, search=prefix))
        )
        names = [model.id.split("/", 1)[1] for model in models]
        return sorted({name.removeprefix(prefix) for name in names if name.startswith(prefix)})


class SharedRepo(Layout):
    """One repo that all clients write to, `ORG/RUN-mailbox`: for a few that trust each other."""

    name = "shared"

    def found(self, *, private: bool) -> None:
        """Create the shared repo."""
        self._found_shared(private=private)

    def place(self, client_id: str, enrolment: Enrolment) -> Place:
        """The same repo for all."""
        return Place(self.mailbox_repo(), "main", shared=True)

    def marker(self, client_id: str) -> Marker:
        """The repo is everybody's."""
        return Marker(self.address.repo_id)

    def clients(self) -> list[str]:
        """Nobody has a place of its own; the rounds' folders tell."""
        return []

    def list_folder(self, round: int, refinements: bool = False) -> list[UpdateRef]:
        """The round's folder, in one request."""
        refs = []
        for entry in self.mailbox_repo().list(round_folder(round, refinements)):
            name = entry.path.rsplit("/", 1)[-1]
            if name.endswith(".safetensors") and is_name(name.removesuffix(".safetensors")):
                sha256 = entry.lfs.sha256 if entry.lfs is not None else ""
                refs.append(
                    UpdateRef(name.removesuffix(".safetensors"), round, entry.size, sha256, "main", refinements)
                )
        return refs

    def tidy(self, round: int, *, clients: int, keep_rounds: int) -> None:
        """Every `TIDY_EVERY` rounds delete old messages, and now and then the history that still holds them.

        Only what this package wrote is removed, and no history that somebody else is part of.
        """
        if not round or round % TIDY_EVERY:
            return
        repo, marker, oldest = self.mailbox_repo(), Marker(self.address.repo_id), round - keep_rounds
        there = read_marker(repo)
        if there is None or not there.same(marker):
            logger.warning("%s is not tidied: it was not made for this federation.", repo.repo_id)
            return
        entries = repo.call(
            "list the rounds of",
            lambda: list(self.api.list_repo_tree(repo.repo_id, "rounds", recursive=True)),
            seconds=TIDYING_SECONDS,
        )
        files = [entry.path for entry in entries if isinstance(entry, RepoFile)]
        if old := _old_folders(files, oldest):
            deletions = [CommitOperationDelete(f"{folder}/", is_folder=True) for folder in old]
            repo.call("tidy", lambda: repo.commit_once(deletions, f"Rounds before {oldest}"), seconds=TIDYING_SECONDS)
        if round % max(TIDY_EVERY, _SQUASH_COMMITS // (clients + 1)) < TIDY_EVERY:
            squash(repo, marker, account=None)


def _old_folders(files: list[str], oldest: int) -> list[str]:
    """Folders of rounds before `oldest` in which this package wrote everything."""
    folders: dict[str, list[str]] = defaultdict(list)
    for path in files:
        folders["/".join(path.split("/")[:2])].append(path)
    ours = {folder for folder, inside in folders.items() if all(is_ours(path, shared=True) for path in inside)}
    return sorted(folder for folder in ours if int(folder.removeprefix("rounds/")) < oldest)


@dataclass(frozen=True)
class PullRequest:
    """A client's pull request."""

    number: int
    author: str

    @property
    def ref(self) -> str:
        """The revision that its messages lie at."""
        return f"refs/pr/{self.number}"


class PullRequests(Layout):
    """One pull request per client to `ORG/RUN-mailbox`, kept for all rounds and never merged: for volunteers.

    A pull request's title says which client it is for; who opened it decides whether that is believed: the enrolled
    account, or, where none is enrolled, whoever came first.
    """

    name = "pull-request"

    def __init__(self, address: HubAddress, api: HfApi, patience: Patience) -> None:
        super().__init__(address, api, patience)
        self._seen: dict[str, list[PullRequest]] | None = None

    def found(self, *, private: bool) -> None:
        """Create the repo that pull requests are made to."""
        self._found_shared(private=private)

    def look(self) -> None:
        """The requests are listed anew when the next place is asked for, once for all clients."""
        self._seen = None

    def place(self, client_id: str, enrolment: Enrolment) -> Place | None:
        """The client's pull request, once it is there."""
        request = self.request(client_id, enrolment.account)
        return None if request is None else Place(self.mailbox_repo(), request.ref)

    def request(self, client_id: str, account: str | None) -> PullRequest | None:
        """The open pull request of a client, as of the last look.

        The lowest number is taken, so that everybody agrees where a lost answer led to two.
        """
        fitting = [request for request in self._requests().get(client_id, []) if account in (None, request.author)]
        return min(fitting, key=lambda request: request.number, default=None)

    def marker(self, client_id: str) -> Marker:
        """The repo is everybody's."""
        return Marker(self.address.repo_id)

    def clients(self) -> list[str]:
        """Clients that have a pull request."""
        return sorted(self._requests())

    def close(self) -> None:
        """Close the pull requests; nothing of them was ever merged."""
        self.look()
        for request in [request for requests in self._requests().values() for request in requests]:
            closing = partial(
                self.api.change_discussion_status,
                self.address.mailbox_repo,
                request.number,
                "closed",
                comment="The federation has ended.",
            )
            try:
                self.mailbox_repo().call(f"close pull request {request.number} of", closing, seconds=_CLOSING_SECONDS)
            except MailboxError as error:  # the others are closed all the same
                logger.warning("%s", error)

    def _requests(self) -> dict[str, list[PullRequest]]:
        """The open pull requests by the client that they are for."""
        if self._seen is None:
            repo_id, seen = self.address.mailbox_repo, dict[str, list[PullRequest]]()
            found = self.mailbox_repo().call(
                "list the pull requests of",
                lambda: list(
                    islice(self.api.get_repo_discussions(repo_id, discussion_type="pull_request"), _MOST_REQUESTS)
                ),
            )
            if len(found) == _MOST_REQUESTS:
                logger.warning("%s has more than %d pull requests; older ones are not seen.", repo_id, _MOST_REQUESTS)
            for entry in found:
                client = entry.title.removeprefix(PULL_REQUEST_TITLE)
                if entry.status in _OPEN and entry.title.startswith(PULL_REQUEST_TITLE) and is_name(client):
                    seen.setdefault(client, []).append(PullRequest(entry.num, entry.author))
            self._seen = seen
        return self._seen


LAYOUTS: dict[str, type[Layout]] = {layout.name: layout for layout in (OwnRepos, SharedRepo, PullRequests)}
