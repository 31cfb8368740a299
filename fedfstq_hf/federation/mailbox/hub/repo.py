"""One Hub repo, patiently: reading files that are proved whole, and committing some."""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers, disable_progress_bars, get_session, hf_raise_for_status, httpx

from fedfstq_hf.errors import MailboxError, MessageError
from fedfstq_hf.federation.mailbox.hub.http import (
    DamagedDownloadError,
    Patience,
    install_timeouts,
    request_timeout,
    timeout_seconds,
)

T = TypeVar("T")

_TRICKLE = 20  # a body that takes longer than that many timeouts is given up
_CHUNK = 1 << 20
_SHORTEST_TIMEOUT = 10.0


@dataclass(frozen=True)
class FileState:
    """What one HEAD request tells of a file: its size, its digest (see `has_digest`) and the commit it was read at."""

    size: int
    etag: str
    commit: str


@dataclass(frozen=True)
class RemoteFile:
    """A file's content, and the commit it was read at."""

    data: bytes
    commit: str


@dataclass(frozen=True)
class RepoState:
    """What one request tells of a repo: its present name, whether only its organisation reads it, its files' paths."""

    repo_id: str
    private: bool
    files: tuple[str, ...]


class HeadMovedError(MailboxError):
    """A commit was refused because its parent is no longer the newest one."""


class HubRepo:
    """A model repo.

    Args:
        repo_id: `org/name`.
        api: the client with its token.
        patience: how long each request is repeated.
    """

    def __init__(self, repo_id: str, api: HfApi, patience: Patience) -> None:
        install_timeouts()
        self.repo_id = repo_id
        self.api = api
        self.patience = patience

    def call(self, what: str, request: Callable[[], T], *, seconds: float | None = None) -> T:
        """`Patience.call` with the repo's name in the errors."""
        return self.patience.call(f"{what} {self.repo_id}", request, seconds=seconds)

    def exists(self) -> bool:
        """Whether the repo is there and this token may see it."""
        return self.info() is not None

    def account(self) -> str:
        """The account of the token. It is asked for once: the Hub limits that strictly."""
        return self.call("ask for the account that writes to", lambda: str(self.api.whoami(cache=True)["name"]))

    def info(self, *, seconds: float | None = None) -> RepoState | None:
        """The repo as it is now; None if it is not there, or hidden from this token."""

        def request() -> RepoState | None:
            try:
                found = self.api.model_info(self.repo_id)
            except RepositoryNotFoundError as error:
                if not _absent(error):
                    raise
                return None
            files = tuple(sibling.rfilename for sibling in found.siblings or ())
            return RepoState(found.id, bool(found.private), files)

        return self.call("look at", request, seconds=seconds)

    def create(self, *, private: bool) -> None:
        """Create the repo unless it is there."""
        self.call("create", lambda: self.api.create_repo(self.repo_id, private=private, exist_ok=True))

    def head(self) -> str:
        """The newest commit's id. It may lag."""
        return self.call("read", lambda: str(self.api.repo_info(self.repo_id).sha))

    def state(self, path: str, *, revision: str = "main", seconds: float | None = None) -> FileState | None:
        """One HEAD request; None if the file or the repo is not there (yet).

        Args:
            seconds: to repeat it for, instead of the general patience; a silent server is then not waited for either.
        """

        def request() -> FileState | None:
            try:
                found = self.api.get_hf_file_metadata(
                    url=self._url(path, revision), token=self.api.token, timeout=_timeout(seconds)
                )
            except (EntryNotFoundError, RepositoryNotFoundError) as error:
                if not _absent(error):
                    raise
                return None
            if found.size is None or found.etag is None or found.commit_hash is None:
                raise DamagedDownloadError(f"the answer about {path} lacks size, digest or commit")
            return FileState(found.size, found.etag, found.commit_hash)

        return self.call(f"look at {path} of", request, seconds=seconds)

    def read(
        self,
        path: str,
        *,
        revision: str = "main",
        max_bytes: int,
        squashed: bool = False,
        seconds: float | None = None,
    ) -> RemoteFile | None:
        """A file's content, compared with the digest that the Hub names; None if it is not there.

        Args:
            max_bytes: larger files are not downloaded.
            squashed: the revision may be gone for good, which is then no reason to wait for it.
            seconds: as for `state`.

        Raises:
            MessageError: it is larger than `max_bytes`; nothing beyond that was read.
        """

        def request() -> RemoteFile | None:
            try:
                return self._download(path, revision, max_bytes, _timeout(seconds))
            except EntryNotFoundError:
                return None
            except RevisionNotFoundError:
                if not squashed:
                    raise
                return None

        return self.call(f"read {path} of", request, seconds=seconds)

    def reach(self, path: str) -> None:
        """Return once the first bytes of a file arrive, from wherever the Hub stores them."""

        def request() -> None:
            with self._opened(path, "main", timeout_seconds()) as response:
                next(response.iter_bytes(_CHUNK), b"")

        self.call(f"reach {path} of", request)

    def list(self, folder: str, *, revision: str = "main") -> list[RepoFile]:
        """The files of a folder, not of its subfolders; none where there is no such folder."""

        def request() -> list[RepoFile]:
            try:
                entries = self.api.list_repo_tree(self.repo_id, folder, revision=revision)
                return [entry for entry in entries if isinstance(entry, RepoFile)]
            except (EntryNotFoundError, RepositoryNotFoundError) as error:
                if not _absent(error):
                    raise
                return []

        return self.call(f"list {folder or 'the files'} of", request)

    def commit_once(
        self,
        operations: Sequence[CommitOperationAdd | CommitOperationDelete],
        message: str,
        *,
        revision: str = "main",
        parent: str | None = None,
    ) -> str:
        """One attempt at a commit; returns its id. To be called within `call`.

        Raises:
            HeadMovedError: `parent` is not the newest commit any more.
        """
        try:
            with disable_progress_bars():  # a few kilobytes; the Trainer's bar is the one to see
                info = self.api.create_commit(
                    self.repo_id, operations, commit_message=message, revision=revision, parent_commit=parent
                )
        except HfHubHTTPError as error:
            if parent is not None and error.response is not None and error.response.status_code == 412:
                raise HeadMovedError(f"{self.repo_id} was changed by somebody else meanwhile.") from None
            raise
        return str(info.oid)

    def _download(self, path: str, revision: str, max_bytes: int, timeout: float) -> RemoteFile:
        give_up = time.monotonic() + _TRICKLE * timeout
        with self._opened(path, revision, timeout) as response:
            told = _first_headers(response)
            if told.size is not None and told.size > max_bytes:
                raise MessageError(f"It has {told.size} bytes; at most {max_bytes} are taken.")
            body = io.BytesIO()
            for chunk in response.iter_bytes(_CHUNK):
                body.write(chunk)
                if body.tell() > max_bytes:
                    raise MessageError(f"It has more than the {max_bytes} bytes that are taken.")
                if time.monotonic() > give_up:
                    raise TimeoutError(f"{path} arrived too slowly")
        data = body.getvalue()
        if told.etag and not has_digest(data, told.etag):
            raise DamagedDownloadError(f"{path} arrived damaged: its digest is not the one that the Hub names")
        return RemoteFile(data, told.commit)

    @contextmanager
    def _opened(self, path: str, revision: str, timeout: float) -> Iterator[httpx.Response]:
        """The answer to a request for a file, its body unread."""
        headers = {**build_hf_headers(token=self.api.token), "Accept-Encoding": "identity"}
        with get_session().stream(
            "GET", self._url(path, revision), headers=headers, timeout=request_timeout(timeout), follow_redirects=True
        ) as response:
            if response.status_code >= 400:
                response.read()
            hf_raise_for_status(response)
            yield response

    def _url(self, path: str, revision: str) -> str:
        return hf_hub_url(self.repo_id, path, revision=revision, endpoint=self.api.endpoint)


def additions(files: Mapping[str, bytes]) -> list[CommitOperationAdd]:
    """New upload operations. File objects, so that they go by LFS, with our timeouts, wherever Xet is installed too."""
    return [CommitOperationAdd(path, io.BytesIO(data)) for path, data in sorted(files.items())]


def has_digest(data: bytes, etag: str) -> bool:
    """Whether an ETag of the Hub can be that of `data`: sha256 for LFS files, git's blob id for others."""
    if len(etag) == 64:
        return hashlib.sha256(data).hexdigest() == etag
    if len(etag) != 40:
        return True  # some other server's tag says nothing about the content
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() == etag


def _timeout(seconds: float | None) -> float:
    """The timeout of one request that is repeated for `seconds`."""
    return timeout_seconds() if seconds is None else min(timeout_seconds(), max(seconds, _SHORTEST_TIMEOUT))


def _absent(error: Exception) -> bool:
    """Whether a thing is not there, rather than kept from a token that is refused or has no access."""
    if isinstance(error, GatedRepoError):
        return False
    response = getattr(error, "response", None)
    return response is None or response.status_code != 401


@dataclass(frozen=True)
class _Told:
    size: int | None
    etag: str
    commit: str


def _first_headers(response: object) -> _Told:
    """What the Hub said before it redirected: the server that has the bytes is not asked what they should be."""
    answers = [*response.history, response]  # type: ignore[attr-defined]
    size, etag, commit = None, "", ""
    for answer in answers:
        headers = answer.headers
        commit = commit or headers.get(constants.HUGGINGFACE_HEADER_X_REPO_COMMIT, "")
        etag = etag or headers.get(constants.HUGGINGFACE_HEADER_X_LINKED_ETAG) or headers.get("ETag") or ""
        linked = headers.get(constants.HUGGINGFACE_HEADER_X_LINKED_SIZE)
        if size is None and linked and linked.isdigit():
            size = int(linked)
    final = answers[-1].headers.get("Content-Length", "")
    if size is None and final.isdigit():
        size = int(final)
    return _Told(size, etag.removeprefix("W/").strip('"'), commit)
