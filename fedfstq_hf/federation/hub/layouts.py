"""Where clients' messages lie on the Hub: one private repo each, one shared repo, or one pull request each.

A layout knows places and who may write them; `posting` puts messages there and `HubMailbox` reads them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from huggingface_hub import HfApi
from huggingface_hub.community import Discussion

from fedfstq_hf.federation.control import Enrolment
from fedfstq_hf.federation.hub.address import HubAddress
from fedfstq_hf.federation.hub.repo import HubRepo
from fedfstq_hf.federation.hub.waiting import Patience
from fedfstq_hf.federation.mailbox import UpdateRef, is_name

PULL_REQUEST_TITLE = "Updates of client "
_OPEN = ("open", "draft")
_CLOSING_SECONDS = 10.0


def round_folder(round: int, refinements: bool = False) -> str:
    """Where a shared repo has the messages of a round, or their refinements."""
    return f"rounds/{round:06d}/{'refinements' if refinements else 'deltas'}"


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


class Layout(ABC):
    """Places of clients in a federation's repos."""

    name: str

    def __init__(self, address: HubAddress, api: HfApi, patience: Patience, *, private: bool) -> None:
        self.address = address
        self.private = private
        self._api = api
        self._patience = patience

    def found(self) -> None:  # noqa: B027  (most layouts need nothing)
        """Make what all clients share, when the federation is founded."""

    @abstractmethod
    def place(self, client_id: str, enrolment: Enrolment) -> Place | None:
        """Where a client writes; None while it has not written anything that would tell."""

    @abstractmethod
    def own_place(self, client_id: str, enrolment: Enrolment) -> Place | None:
        """The same for the client itself, made if need be; None if only its first commit makes it."""

    @abstractmethod
    def clients(self) -> list[str]:
        """Clients that have a place, where nobody is enrolled by name."""

    def list_folder(self, round: int, refinements: bool = False) -> list[UpdateRef] | None:
        """All messages of a round, where one request tells them; None where each client has to be asked for."""
        return None

    def close(self) -> None:  # noqa: B027  (most layouts leave nothing open)
        """Tidy up after the last round."""

    def repo(self, repo_id: str) -> HubRepo:
        """A repo with this layout's client."""
        return HubRepo(repo_id, self._api, self._patience)


class OwnRepos(Layout):
    """One private repo per client, `ORG/RUN-CLIENT`: nobody else can write it, and it has a commit quota of its own."""

    name = "own"

    def __init__(self, address: HubAddress, api: HfApi, patience: Patience, *, private: bool) -> None:
        super().__init__(address, api, patience, private=private)
        self._made: set[str] = set()

    def place(self, client_id: str, enrolment: Enrolment) -> Place:
        """The client's repo, whether it exists yet or not."""
        return Place(self.repo(enrolment.repo or self.address.client_repo(client_id)), "main")

    def own_place(self, client_id: str, enrolment: Enrolment) -> Place:
        """The client's repo, created where it is missing."""
        place = self.place(client_id, enrolment)
        if place.repo.repo_id not in self._made:
            if not place.repo.exists():
                place.repo.create(private=self.private)
            self._made.add(place.repo.repo_id)
        return place

    def clients(self) -> list[str]:
        """Clients whose repos the Hub lists under the federation's name."""
        prefix = f"{self.address.name}-"
        models = self.repo(self.address.repo_id).call(
            "list the clients of", lambda: list(self._api.list_models(author=self.address.org, search=prefix))
        )
        names = [model.id.split("/", 1)[1] for model in models]
        return sorted(name.removeprefix(prefix) for name in names if name.startswith(prefix) and is_name(name))


class SharedRepo(Layout):
    """One repo that all clients write to, `ORG/RUN-mailbox`: for a few that trust each other."""

    name = "shared"

    def found(self) -> None:
        """Create the shared repo."""
        self._shared().create(private=self.private)

    def place(self, client_id: str, enrolment: Enrolment) -> Place:
        """The same repo for all."""
        return Place(self._shared(), "main", shared=True)

    def own_place(self, client_id: str, enrolment: Enrolment) -> Place:
        """The same repo for all."""
        return self.place(client_id, enrolment)

    def clients(self) -> list[str]:
        """Nobody has a place of its own; the rounds' folders tell."""
        return []

    def list_folder(self, round: int, refinements: bool = False) -> list[UpdateRef]:
        """The round's folder, in one request."""
        refs = []
        for entry in self._shared().list(round_folder(round, refinements)):
            client = entry.path.rsplit("/", 1)[-1]
            if client.endswith(".safetensors") and is_name(client.removesuffix(".safetensors")):
                sha256 = entry.lfs.sha256 if entry.lfs is not None else ""
                name = client.removesuffix(".safetensors")
                refs.append(UpdateRef(name, round, entry.size, sha256, "main", refinements))
        return sorted(refs)

    def _shared(self) -> HubRepo:
        return self.repo(self.address.mailbox_repo)


class PullRequests(Layout):
    """One pull request per client to `ORG/RUN-mailbox`, kept for all rounds and never merged: for volunteers.

    A pull request's title says which client it is for; who opened it decides whether that is believed: the enrolled
    account, or, where none is enrolled, whoever came first.
    """

    name = "pull-request"

    def __init__(self, address: HubAddress, api: HfApi, patience: Patience, *, private: bool) -> None:
        super().__init__(address, api, patience, private=private)
        self._numbers: dict[str, int] = {}

    def found(self) -> None:
        """Create the repo that pull requests are made to."""
        self._target().create(private=self.private)

    def place(self, client_id: str, enrolment: Enrolment) -> Place | None:
        """The client's pull request, once it is there."""
        if client_id not in self._numbers:
            number = self._find(client_id, enrolment.account)
            if number is None:
                return None
            self._numbers[client_id] = number
        return Place(self._target(), f"refs/pr/{self._numbers[client_id]}")

    def own_place(self, client_id: str, enrolment: Enrolment) -> Place | None:
        """The client's pull request, if it has one; its first commit opens it."""
        return self.place(client_id, enrolment)

    def clients(self) -> list[str]:
        """Clients that have a pull request."""
        names = (entry.title.removeprefix(PULL_REQUEST_TITLE) for entry in self._requests())
        return sorted({name for name in names if is_name(name)})

    def close(self) -> None:
        """Close the pull requests; nothing of them was ever merged."""
        for number in [entry.num for entry in self._requests()]:
            request = partial(
                self._api.change_discussion_status,
                self.address.mailbox_repo,
                number,
                "closed",
                comment="The federation has ended.",
            )
            self._target().call(f"close pull request {number} of", request, seconds=_CLOSING_SECONDS)

    def _find(self, client_id: str, account: str | None) -> int | None:
        """The lowest number is taken, so that everybody agrees where a lost answer led to two."""
        numbers = [
            entry.num
            for entry in self._requests()
            if entry.title == PULL_REQUEST_TITLE + client_id and account in (None, entry.author)
        ]
        return min(numbers, default=None)

    def _requests(self) -> Sequence[Discussion]:
        found = self._target().call(
            "list the pull requests of",
            lambda: list(self._api.get_repo_discussions(self.address.mailbox_repo, discussion_type="pull_request")),
        )
        return [entry for entry in found if entry.status in _OPEN and entry.title.startswith(PULL_REQUEST_TITLE)]

    def _target(self) -> HubRepo:
        return self.repo(self.address.mailbox_repo)


LAYOUTS: dict[str, type[Layout]] = {layout.name: layout for layout in (OwnRepos, SharedRepo, PullRequests)}
