"""Git's object names, computed as git computes them: blobs, trees, commits and LFS pointers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any


def git_oid(kind: str, content: bytes) -> str:
    """SHA-1 of a git object of that kind ("blob", "tree", "commit")."""
    return hashlib.sha1(f"{kind} {len(content)}\0".encode() + content).hexdigest()


def lfs_pointer(sha256: str, size: int) -> bytes:
    """The text that git holds in place of a file kept in LFS."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


@dataclass(frozen=True)
class File:
    """A file of a tree: `oid` names its git blob (for LFS, the pointer's), `sha256` is set for LFS files only."""

    oid: str
    size: int
    sha256: str | None = None

    @property
    def etag(self) -> str:
        return self.sha256 or self.oid

    @property
    def pointer_size(self) -> int:
        return len(lfs_pointer(self.sha256 or "", self.size))


def tree_oids(files: Mapping[str, File]) -> dict[str, str]:
    """Object name of every folder, "" being the root."""
    root: dict[str, Any] = {}
    for path, file in files.items():
        *folders, name = path.split("/")
        folder = root
        for part in folders:
            folder = folder.setdefault(part, {})
        folder[name] = file.oid
    oids: dict[str, str] = {}

    def name_tree(folder: dict[str, Any], path: str) -> str:
        entries = []
        for name, child in folder.items():
            if isinstance(child, dict):
                oid = name_tree(child, f"{path}/{name}" if path else name)
                entries.append((f"{name}/".encode(), f"40000 {name}".encode(), oid))
            else:
                entries.append((name.encode(), f"100644 {name}".encode(), child))
        entries.sort()  # git sorts a folder as if its name ended in a slash
        oids[path] = git_oid("tree", b"".join(entry + b"\0" + bytes.fromhex(oid) for _, entry, oid in entries))
        return oids[path]

    name_tree(root, "")
    return oids


@dataclass(frozen=True)
class Commit:
    """A commit with its whole tree: `files` by path, `folders` (object names) by path, "" being the root."""

    oid: str
    parents: tuple[str, ...]
    files: Mapping[str, File]
    folders: Mapping[str, str]
    title: str
    message: str
    author: str
    date: datetime


def make_commit(
    files: Mapping[str, File], parents: tuple[str, ...], title: str, message: str, author: str, date: datetime
) -> Commit:
    """A commit named as git would name it."""
    folders = tree_oids(files)
    signed = f"{author} <{author}@users.noreply.localhost> {int(date.timestamp())} +0000"
    lines = [f"tree {folders['']}", *(f"parent {parent}" for parent in parents)]
    lines += [f"author {signed}", f"committer {signed}", "", title]
    text = "\n".join(lines) + (f"\n\n{message}" if message else "") + "\n"
    return Commit(git_oid("commit", text.encode()), parents, files, folders, title, message, author, date)
