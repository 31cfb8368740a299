"""The global repo: published rounds, the control file and the coordinator's metrics, each change one commit.

Whoever has seen a round reads at the commit that held it, and never goes back behind it. A round is one commit on top
of the commit that it was made from, so two coordinators cannot both publish it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fedfstq_hf.errors import MailboxError, MailboxUnavailableError, MessageError, RoundConflictError
from fedfstq_hf.federation.control import Control
from fedfstq_hf.federation.mailbox.hub import files as paths
from fedfstq_hf.federation.mailbox.hub.files import layout_in, most_bytes, parse_metrics, round_in, with_metric
from fedfstq_hf.federation.mailbox.hub.http import TIDYING_SECONDS, Outcome, Patience, diagnose
from fedfstq_hf.federation.mailbox.hub.repo import FileState, HeadMovedError, HubRepo, RemoteFile, additions
from fedfstq_hf.federation.mailbox.protocol import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    CARD_FILE,
    LAYOUTS,
    RECORD_FILE,
    SPEC_FILE,
    RootFiles,
)

logger = logging.getLogger(__name__)

_FIRST_LOOKS = (0.5, 1.0, 2.0)  # seconds
_MOST_CANDIDATES = 20  # commits that say they are of one round; a rollback or a lost answer makes a second one

Reader = Callable[[str], bytes | None]
"""Reads a path at the commit that the new one is put on top of."""


class GlobalRepo:
    """What one process has seen of a federation's global repo, and its commits there.

    Args:
        repo: the global repo.
        address: `hf://org/repo`, for errors.
        create: the federation may be missing: it is going to be founded here.
    """

    def __init__(self, repo: HubRepo, address: str, patience: Patience, *, create: bool) -> None:
        self.repo = repo
        self.address = address
        self._patience = patience
        self._create = create
        self._head: int | None = None
        self._head_etag = ""
        self._commit: str | None = None
        self._control: tuple[str, bytes | None] | None = None
        self._parsed_control: tuple[bytes | None, Control] | None = None
        self._layout: str | None = None
        self._first_control: bytes | None = None
        self._kept: dict[str, bytes] = {}
        self._record: bytes | None = None  # of the known head

    # -- rounds -----------------------------------------------------------------------------------------------------

    def head(self) -> int | None:
        """The newest published round; one HEAD request while nothing is new. It never goes back."""
        state = self.repo.state(paths.HEAD_PATH)
        if state is None and self._head is None and not self._create:
            state = self._first_look()
        if state is None:
            if self._head is None and not self._create and not self.repo.exists():
                raise MailboxError(
                    f"There is no repo {self.repo.repo_id}, or this token may not see it. Check the address; type "
                    "`hf auth login` (or set HF_TOKEN) with an account that may read it; or found a federation with "
                    f"`fedfstq init {self.address} ...`."
                )
            return self._head
        if state.etag != self._head_etag:
            file = read_global(self.repo, paths.HEAD_PATH, revision=state.commit)
            round = round_in(file.data if file is not None else None, self.address)
            if self._head is None or round >= self._head:
                self._head, self._head_etag, self._commit = round, state.etag, state.commit
                self._record = None if file is None else file.data
        elif self._head is not None:
            self._commit = state.commit
        return self._head

    def wait_for_answer(self) -> None:
        """Return when repo and storage answer. Raises `MailboxUnavailableError` where they do not for too long."""
        self.repo.reach(paths.head_path(ADAPTER_FILE))

    def _first_look(self) -> FileState | None:
        """What is read back may lag: a federation that was founded a moment ago is given some seconds to show."""
        for wait in _FIRST_LOOKS:
            self._patience.sleep(wait)
            state = self.repo.state(paths.HEAD_PATH)
            if state is not None:
                return state
        return None

    def read(self, round: int, name: str, max_bytes: int | None = None) -> bytes:
        """A file of a published round, at the commit that was seen to hold it."""
        path = paths.round_path(round, name) or paths.head_path(name)
        constant = name in (SPEC_FILE, ADAPTER_CONFIG_FILE)
        if constant and path in self._kept:
            return self._kept[path]
        if self._head is None or round > self._head:
            self.head()
        revision = self._commit
        if paths.round_path(round, name) is None and not constant and round != self._head:
            revision = find_round(self.repo, round)
        file = None
        if self._head is not None:
            file = read_global(self.repo, path, revision=revision or "main", max_bytes=max_bytes)
        if file is None:
            raise MailboxError(
                f"{self.address} has no file {name} of round {round}. Expected a federation made by "
                f"`fedfstq init {self.address} ...`."
            )
        if constant:
            self._kept[path] = file.data
        return file.data

    def read_root(self, name: str) -> bytes | None:
        """A file for people as it is now, None where there is none."""
        file = read_global(self.repo, paths.root_path(name), revision=self._commit or "main")
        return None if file is None else file.data

    def layout(self) -> str:
        """The name of the federation's layout, which never changes.

        Raises:
            MailboxError: the layout file is missing, damaged or of a newer version.
        """
        if self._layout is None:
            if self._commit is None:
                self.head()
            file = read_global(self.repo, paths.LAYOUT_PATH, revision=self._commit or "main")
            name = None if file is None else layout_in(file.data)
            if name is None or name not in LAYOUTS:
                raise MailboxError(
                    f"{self.address} does not say how its clients' messages are laid out ({paths.LAYOUT_PATH} is "
                    "missing, damaged or of a newer version). Restore it from the repo's history, or update fedfstq_hf."
                )
            self._layout = name
        return self._layout

    def publish(
        self, round: int, files: Mapping[str, bytes], root: RootFiles | None, *, layout_file: bytes | None = None
    ) -> None:
        """Publish a round in one commit on top of the previous one; round 0 with the layout and the control file.

        What people changed in between (the card, say) is left as it is: the commit is then made again on top of it.
        """
        written = paths.publication(round, dict(files))
        if layout_file is not None:
            written[paths.LAYOUT_PATH] = layout_file
        if round == 0 and self._first_control is not None:
            written[paths.CONTROL_PATH] = self._first_control
        record = files[RECORD_FILE]

        def make(read: Reader) -> dict[str, bytes]:
            made = {} if root is None else root(lambda name: read(paths.root_path(name)))
            return {**{paths.root_path(name): data for name, data in made.items()}, **written}

        def check(read: Reader) -> bool:
            present = read(paths.HEAD_PATH)
            if present == record:
                return True  # an answer was lost, the commit was not
            there = -1 if present is None else round_in(present, self.address)
            if there >= round or (there == round - 1 and before not in (None, present)):  # or made from another one
                raise round_taken(round, self.address)
            if present is None:
                refuse_foreign(read, written, self.repo.repo_id)
            return False

        # Only a commit that was seen to hold the previous round can be built on without looking.
        known = self._head == round - 1 and round > 0
        parent, before = (self._commit, self._record) if known else (None, None)
        commit = Swap(self.repo, f"Round {round}", make, check, parent).run()
        self._head, self._head_etag, self._commit, self._record = round, "", commit, record

    def refresh_root(self, root: RootFiles | None) -> None:
        """Renew the files for people, where they are not what they should be."""
        if root is None or self._head is None:
            return
        head = self._head

        def changed(read: Reader) -> dict[str, bytes]:
            made = {paths.root_path(name): data for name, data in root(lambda n: read(paths.root_path(n))).items()}
            return {path: data for path, data in made.items() if read(path) != data}

        def check(read: Reader) -> bool:  # nothing to do, or a newer round that has its own files
            return round_in(read(paths.HEAD_PATH), self.address) != head or not changed(read)

        self._go_on(Swap(self.repo, "Model card", changed, check))

    def tag(self, round: int) -> None:
        """Keep the commit of the round that was published last."""
        tag_round(self.repo, round, self._commit)

    # -- control and metrics ----------------------------------------------------------------------------------------

    def read_control(self) -> bytes | None:
        """The control file as of the last look at the head."""
        if self._commit is None:
            self.head()
        commit = self._commit
        if commit is None:
            return self._first_control
        if self._control is None or self._control[0] != commit:
            file = read_global(self.repo, paths.CONTROL_PATH, revision=commit)
            self._control = (commit, None if file is None else file.data)
        return self._control[1]

    def control(self) -> Control:
        """The same, parsed once."""
        data = self.read_control()
        if self._parsed_control is None or self._parsed_control[0] != data:
            self._parsed_control = (data, Control.from_json(data))
        return self._parsed_control[1]

    def write_control(self, data: bytes, *, expected: bytes | None) -> bool:
        """Replace the control file if it still is `expected`."""
        if self._head is None and self._create:  # it goes with the first commit, or not at all
            self._first_control = data
            return True
        present: list[bytes | None] = []

        def check(read: Reader) -> bool:
            present[:] = [read(paths.CONTROL_PATH)]
            return present[0] != expected

        self._go_on(Swap(self.repo, "Control", lambda read: {paths.CONTROL_PATH: data}, check))
        written = present[0] in (expected, data)
        self._control = (self._commit or "", data if written else present[0])
        return written

    def post_metric(self, round: int, source: str, metrics: Mapping[str, Any]) -> None:
        """Add one metric to the metrics file."""

        most = most_bytes(paths.METRICS_PATH)

        def merged(read: Reader) -> dict[str, bytes]:
            return {paths.METRICS_PATH: with_metric(read(paths.METRICS_PATH), round, source, metrics, max_bytes=most)}

        def check(read: Reader) -> bool:
            return read(paths.METRICS_PATH) == merged(read)[paths.METRICS_PATH]

        self._go_on(Swap(self.repo, "Metrics", merged, check))

    def _go_on(self, swap: Swap) -> None:
        """Make a commit beside the rounds; go on from it unless it came after one that may hold a newer round."""
        commit = swap.run()
        if self._head is not None and swap.base == self._commit:
            self._commit = commit

    def read_metrics(self) -> dict[int, dict[str, dict[str, Any]]]:
        """What the metrics file holds: round -> source -> name -> value."""
        try:
            file = read_global(self.repo, paths.METRICS_PATH, revision=self._commit or "main")
        except MailboxUnavailableError:
            raise
        except MailboxError as error:
            logger.warning("%s It is left out.", error)
            return {}
        most = most_bytes(paths.METRICS_PATH)
        return parse_metrics(None if file is None else file.data, self.address, max_bytes=most)


def tag_round(repo: HubRepo, round: int, commit: str | None) -> None:
    """Keep a round's commit by a tag."""
    repo.call(
        "tag",
        lambda: repo.api.create_tag(repo.repo_id, tag=_tag_name(round), revision=commit, exist_ok=True),
        seconds=TIDYING_SECONDS,
    )


def find_round(repo: HubRepo, round: int) -> str:
    """The commit of an earlier round, by its tag or its title; what it holds decides.

    Raises:
        MailboxError: the repo's history was squashed, and the round had no tag.
    """
    tags = repo.call("list the tags of", lambda: repo.api.list_repo_refs(repo.repo_id).tags)
    named = [tag.target_commit for tag in tags if tag.name == _tag_name(round)]
    commits = repo.call("list the commits of", lambda: repo.api.list_repo_commits(repo.repo_id))
    named += [commit.commit_id for commit in commits if commit.title == f"Round {round}"]
    for commit in named[:_MOST_CANDIDATES]:
        file = read_global(repo, paths.HEAD_PATH, revision=commit)
        if file is not None and round_in(file.data, repo.repo_id) == round:
            return commit
    raise MailboxError(
        f"{repo.repo_id} no longer holds round {round}: its history was squashed. Rounds with a tag are kept; there "
        f"are {', '.join(tag.name for tag in tags) or 'none'}."
    )


def _tag_name(round: int) -> str:
    return f"round-{round:06d}"


def read_global(repo: HubRepo, path: str, *, revision: str = "main", max_bytes: int | None = None) -> RemoteFile | None:
    """A file of the global repo, None where there is none.

    Args:
        max_bytes: less than the path allows.

    Raises:
        MailboxError: it is too large; it was not downloaded.
    """
    most = most_bytes(path) if max_bytes is None else min(max_bytes, most_bytes(path))
    try:
        return repo.read(path, revision=revision, max_bytes=most)
    except MessageError as error:
        raise MailboxError(f"{path} of {repo.repo_id} is too large. {error}") from None


@dataclass
class Swap:
    """One commit that must come directly after what it was made from.

    Attributes:
        parent: the commit it is put on top of; None to ask for the newest.
        files: path -> content, made from what stands at the parent.
        check: says whether what stands at a newer parent is the commit already made (True), lets it be made on top
            (False), or raises.
        base: the commit that it came after, once it is made, or that `check` found it at.
    """

    repo: HubRepo
    message: str
    files: Callable[[Reader], Mapping[str, bytes]]
    check: Callable[[Reader], bool]
    parent: str | None = None
    base: str | None = None

    def run(self) -> str:
        """Make the commit; returns its id.

        Raises:
            RoundConflictError: whatever `check` raises.
            MailboxUnavailableError: patience ran out; whether it was made is then unknown.
        """
        return self.repo.call("publish to", self._attempt)

    def _attempt(self) -> str:
        """One attempt. Whatever may have moved the head or hidden an answer makes the next attempt look first."""
        if self.parent is None:
            head = self.repo.head()
            if self.check(self._reader(head)):
                self.base = head
                return head
            self.parent = head
        parent, self.parent = self.parent, None
        try:
            return self._commit(parent)
        except HeadMovedError as error:
            raise ConnectionError(str(error)) from None  # look again, after a while: what is read back may lag
        except Exception as error:
            if diagnose(error).outcome is Outcome.BUSY:
                self.parent = parent  # nothing happened: the same commit may still fit
            raise

    def _commit(self, parent: str) -> str:
        self.base = parent
        files = dict(self.files(self._reader(parent)))
        try:
            return self.repo.commit_once(additions(files), self.message, parent=parent)
        except ValueError as error:  # what the client makes of a card that the Hub refuses
            if CARD_FILE not in files:
                raise
            logger.warning("The Hub refuses the model card (%s); publishing without it.", error)
            del files[CARD_FILE]
            return self.repo.commit_once(additions(files), self.message, parent=parent)

    def _reader(self, revision: str) -> Reader:
        def read(path: str) -> bytes | None:
            file = read_global(self.repo, path, revision=revision)
            return None if file is None else file.data

        return read


def refuse_foreign(read: Reader, paths: Mapping[str, bytes], address: str) -> None:
    """Raise `MailboxError` if a new federation would overwrite files that are not its own."""
    foreign = [path for path in paths if path != CARD_FILE and read(path) is not None]
    if foreign:
        raise MailboxError(
            f"The repo {address} already holds {', '.join(sorted(foreign)[:3])}, which a new federation would "
            "overwrite. Give a repo of its own to the federation, or remove the files first."
        )


def round_taken(round: int, address: str) -> RoundConflictError:
    """The error for a round that somebody else published."""
    return RoundConflictError(f"Round {round} of {address} is published already.")
