"""A repository of the loopback Hub: content-addressed files, commits with parents, refs, tags, pull requests."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

from tests.loopback_hub.discussions import Discussion
from tests.loopback_hub.errors import HubError, entry_not_found, revision_not_found
from tests.loopback_hub.objects import Commit, File, git_oid, lfs_pointer, make_commit

LFS_SUFFIXES = (".safetensors", ".bin", ".png", ".pt", ".pth", ".npz", ".npy", ".zip", ".gz", ".zst", ".parquet")
GIT_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()
MAIN = "refs/heads/main"
BUSY = "Another commit operation is in progress for this repository. Please try again later."
STALE_PARENT = "A commit has happened since. Please refresh and try again."


@dataclass(frozen=True)
class Change:
    """One line of a commit: `kind` is file, lfsFile, deletedFile or deletedFolder, as on the wire."""

    kind: str
    path: str
    content: bytes = b""
    sha256: str = ""


class Repository:
    """All methods are safe to call from several threads. Revisions are a branch, a tag, a full ref or a commit."""

    def __init__(self, id: str, type: str, creator: str, private: bool = False) -> None:
        self.id, self.type, self.creator, self.private = id, type, creator, private
        self.gated: str | bool = False
        self.granted: set[str] = set()  # users let through the gate
        self.created_at = datetime.now(UTC)
        self.refs: dict[str, str] = {}
        self.discussions: dict[int, Discussion] = {}
        self._commits: dict[str, Commit] = {}
        self._blobs: dict[str, bytes] = {}  # by git oid
        self._lfs: dict[str, bytes] = {}  # by sha256
        self._moves: dict[str, list[tuple[float, str]]] = {}  # every ref's (time, commit), oldest first
        self._lock = threading.RLock()
        self._committing = threading.Lock()
        files = self._apply({}, [Change("file", ".gitattributes", GIT_ATTRIBUTES)])
        self._store(MAIN, make_commit(files, (), "initial commit", "", creator, self.created_at))

    @property
    def namespace(self) -> str:
        return self.id.split("/")[0]

    # Reading

    def find_ref(self, revision: str) -> str | None:
        """The full name of a branch, tag or ref; None where `revision` is none of them."""
        names = (revision, f"refs/heads/{revision}", f"refs/tags/{revision}")
        return next((name for name in names if name in self.refs), None)

    def commit_at(self, revision: str, lag: float = 0.0, back: int = 0) -> Commit:
        """The commit of a revision. A reader that lags sees a ref as it stood `lag` seconds or `back` moves ago."""
        with self._lock:
            ref = self.find_ref(revision)
            if ref is None:
                if commit := self._commits.get(revision.lower()):
                    return commit
                raise revision_not_found(revision)
            moves = self._moves[ref]
            if back:
                return self._commits[moves[max(len(moves) - 1 - back, 0)][1]]
            if lag > 0:
                seen = [oid for moved, oid in moves if moved <= time.monotonic() - lag]
                return self._commits[seen[-1] if seen else moves[0][1]]
            return self._commits[self.refs[ref]]

    def content(self, file: File) -> bytes:
        """A file's bytes."""
        return self._blobs[file.oid] if file.sha256 is None else self._lfs[file.sha256]

    def has_lfs(self, sha256: str) -> bool:
        return sha256 in self._lfs

    def lfs(self, sha256: str) -> bytes | None:
        return self._lfs.get(sha256)

    def history(self, commit: Commit) -> list[Commit]:
        """The commit and its ancestors along first parents, newest first."""
        with self._lock:
            commits = [commit]
            while (parents := commits[-1].parents) and parents[0] in self._commits:  # a squash may have come between
                commits.append(self._commits[parents[0]])
            return commits

    # Writing

    def put_lfs(self, sha256: str, content: bytes) -> None:
        """Keep an uploaded object. 400 if its bytes are not what its name says."""
        if hashlib.sha256(content).hexdigest() != sha256:
            raise HubError(400, "The provided 'x-amz-content-sha256' header does not match what was computed.")
        self._lfs[sha256] = content

    @contextmanager
    def exclusive(self, seconds: float) -> Iterator[None]:
        """Hold the repository for one commit that takes that long; 409 while another one does."""
        if not self._committing.acquire(blocking=seconds <= 0):
            raise HubError(409, BUSY)
        try:
            yield
            if seconds > 0:
                time.sleep(seconds)
        finally:
            self._committing.release()

    def commit(
        self, ref: str, changes: Iterable[Change], title: str, message: str, author: str, parent: str | None = None
    ) -> Commit:
        """Add a commit to a ref, even an empty one. 412 if `parent` is given and is not the ref's head."""
        with self._lock:
            head = self.commit_at(ref)
            if parent is not None and not head.oid.startswith(parent):
                raise HubError(412, STALE_PARENT)
            files = self._apply(head.files, changes)
            commit = make_commit(files, (head.oid,), title, message, author, datetime.now(UTC))
            return self._store(ref, commit)

    def squash(self, branch: str, message: str, author: str) -> Commit:
        """Replace a branch's history by one commit with the same files; what no ref reaches any more is gone."""
        with self._lock:
            ref = f"refs/heads/{branch}"
            if ref not in self.refs:
                raise revision_not_found(branch)
            self._moves[ref] = []
            commit = make_commit(self.commit_at_head(ref).files, (), message, "", author, datetime.now(UTC))
            self._store(ref, commit)
            self._forget_unreachable()
            return commit

    def commit_at_head(self, ref: str) -> Commit:
        return self._commits[self.refs[ref]]

    def add_ref(self, ref: str, revision: str) -> None:
        """Create a branch, tag or pull request ref. 409 if there is one."""
        with self._lock:
            if ref in self.refs:
                raise HubError(409, "Reference already exists")
            self._move(ref, self.commit_at(revision).oid)

    def delete_ref(self, ref: str) -> None:
        with self._lock:
            if ref not in self.refs:
                raise revision_not_found(ref)
            del self.refs[ref], self._moves[ref]
            self._forget_unreachable()

    def add_discussion(self, title: str, description: str, author: str, pull_request: bool, status: str) -> Discussion:
        """A discussion or, on top of main's head, a pull request."""
        with self._lock:
            base = self.refs[MAIN] if pull_request else None
            discussion = Discussion(len(self.discussions) + 1, title, description, author, status, base)
            self.discussions[discussion.num] = discussion
            if pull_request:
                self.add_ref(discussion.ref, MAIN)
            return discussion

    def discard(self, discussion: Discussion) -> None:
        """Take back the pull request added last, whose first commit was refused."""
        with self._lock:
            del self.discussions[discussion.num], self.refs[discussion.ref], self._moves[discussion.ref]

    def conflicts(self, discussion: Discussion) -> list[str]:
        """Paths that a pull request and main changed since the request was opened, to different contents."""
        base, ours, theirs = self._three_sides(discussion)
        paths = sorted(ours.keys() | theirs.keys() | base.keys())
        return [p for p in paths if base.get(p) != theirs.get(p) and ours.get(p) not in (base.get(p), theirs.get(p))]

    def merge(self, discussion: Discussion, author: str) -> Commit:
        """Put a pull request's changes on main as one commit. 409 where main changed the same files."""
        with self._lock:
            if conflicting := self.conflicts(discussion):
                raise HubError(409, f"Pull request has conflicts: {', '.join(conflicting)}")
            base, ours, theirs = self._three_sides(discussion)
            files = {path: file for path, file in ours.items() if path in theirs or path not in base}
            files |= {path: file for path, file in theirs.items() if base.get(path) != file}
            title = f"{discussion.title} (#{discussion.num})"
            commit = make_commit(files, (self.refs[MAIN],), title, "", author, datetime.now(UTC))
            discussion.merge_commit = commit.oid
            return self._store(MAIN, commit)

    def _three_sides(self, discussion: Discussion) -> tuple[Mapping[str, File], Mapping[str, File], Mapping[str, File]]:
        base = self._commits[discussion.base] if discussion.base in self._commits else self.commit_at_head(MAIN)
        return base.files, self.commit_at_head(MAIN).files, self.commit_at_head(discussion.ref).files

    def _apply(self, files: Mapping[str, File], changes: Iterable[Change]) -> dict[str, File]:
        result = dict(files)
        for change in changes:
            path = change.path.rstrip("/")
            if not path or path.startswith("/") or any(part in ("", ".", "..", ".git") for part in path.split("/")):
                raise HubError(400, f"Invalid path: {change.path}")
            match change.kind:
                case "file":
                    oid = git_oid("blob", change.content)
                    self._blobs[oid] = change.content
                    result[path] = File(oid, len(change.content))
                case "lfsFile":
                    if change.sha256 not in self._lfs:
                        raise HubError(
                            400,
                            "Your push was rejected because an LFS pointer pointed to a file that does not exist. "
                            f"Offending file: {path}, oid {change.sha256}",
                        )
                    size = len(self._lfs[change.sha256])
                    result[path] = File(git_oid("blob", lfs_pointer(change.sha256, size)), size, change.sha256)
                case "deletedFile":
                    if result.pop(path, None) is None:
                        raise entry_not_found(f"A file with this name doesn't exist: {path}")
                case "deletedFolder":
                    inside = [name for name in result if name.startswith(f"{path}/")]
                    if not inside:
                        raise entry_not_found(f"A folder with this name doesn't exist: {path}")
                    for name in inside:
                        del result[name]
                case _:
                    raise HubError(400, f"Unknown commit operation: {change.kind}")
        for path in {change.path for change in changes}:
            folders = path.split("/")[:-1]
            if path in result and any("/".join(folders[: depth + 1]) in result for depth in range(len(folders))):
                raise HubError(400, f"A parent of {path} is a file")
        return result

    def _store(self, ref: str, commit: Commit) -> Commit:
        with self._lock:
            self._commits[commit.oid] = commit
            self._move(ref, commit.oid)
        return commit

    def _move(self, ref: str, oid: str) -> None:
        self.refs[ref] = oid
        self._moves.setdefault(ref, []).append((time.monotonic(), oid))

    def _forget_unreachable(self) -> None:
        kept, waiting = set(), list(self.refs.values())
        while waiting:
            oid = waiting.pop()
            if oid not in kept:
                kept.add(oid)
                waiting += self._commits[oid].parents
        self._commits = {oid: commit for oid, commit in self._commits.items() if oid in kept}
        for ref, moves in self._moves.items():
            self._moves[ref] = [move for move in moves if move[1] in kept]
