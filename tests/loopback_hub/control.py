"""What a test does behind the Hub's back: make users and repositories, look into them, edit them as on the website."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.loopback_hub.repository import Change, Repository
from tests.loopback_hub.state import HubState


class Control:
    """Arguments and results are plain values, so that the same calls work from another process."""

    def __init__(self, state: HubState) -> None:
        self.state = state

    def org(self, name: str) -> str:
        """Make an organisation."""
        return self.state.accounts.add_organization(name).name

    def user(self, name: str, role: str = "write", org: str | None = None, member: str | None = None) -> str:
        """Make a user (a member of `org` if given) and return a token of theirs.

        `role` is the token's: "read", "write" or "admin" (a write token), or "contributor": a fine-grained token that
        may create repositories in `org` and write only those the user created. `member` is the role in `org`, by
        default the same word; `user("eve", "write", org="lab", member="read")` reads the organisation and opens pull
        requests.
        """
        self.state.accounts.add_user(name, org, member or role)
        if role == "contributor":
            return self.state.accounts.add_token(name, "fineGrained", creates_in=org or name).secret
        return self.state.accounts.add_token(name, "read" if role == "read" else "write").secret

    def token(self, user: str, role: str = "fineGrained", repos: list[str] | None = None) -> str:
        """Another token of a user; a fine-grained one reads and writes `repos` only."""
        return self.state.accounts.add_token(user, role, frozenset(repos or ())).secret

    def revoke(self, token: str) -> None:
        """Make a token invalid."""
        self.state.accounts.revoke(token)

    def repo(self, id: str, type: str = "model", private: bool = False, creator: str | None = None) -> str:
        """Make a repository; by default its namespace is its creator."""
        self.state.store.create(id, type, creator or id.split("/")[0], private)
        return id

    def repos(self, type: str = "model") -> list[str]:
        """Ids of all repositories, private ones too, in the order of their creation."""
        return [repository.id for repository in self.state.store.all(type)]

    def gate(self, id: str, granted: list[str] | None = None, type: str = "model") -> None:
        """Gate a repository: its files are open to its namespace and to the users granted."""
        repository = self._get(id, type)
        repository.gated, repository.granted = "manual", set(granted or ())

    def files(self, id: str, revision: str = "main", type: str = "model") -> list[str]:
        """Sorted paths, without .gitattributes, which every new repository has."""
        return sorted(path for path in self._get(id, type).commit_at(revision).files if path != ".gitattributes")

    def read(self, id: str, path: str, revision: str = "main", type: str = "model") -> bytes:
        """A file's bytes."""
        repository = self._get(id, type)
        return repository.content(repository.commit_at(revision).files[path])

    def write(
        self,
        id: str,
        files: Mapping[str, bytes],
        message: str = "Edited on the website",
        author: str | None = None,
        revision: str = "main",
        type: str = "model",
    ) -> str:
        """Commit regular files past all faults and locks; the new commit's oid."""
        repository = self._get(id, type)
        changes = [Change("file", path, content) for path, content in files.items()]
        ref = repository.find_ref(revision) or revision
        return repository.commit(ref, changes, message, "", author or repository.creator).oid

    def head(self, id: str, revision: str = "main", type: str = "model") -> str:
        """The commit that a revision stands at."""
        return self._get(id, type).commit_at(revision).oid

    def commits(self, id: str, revision: str = "main", type: str = "model") -> list[dict[str, Any]]:
        """oid, title, message, author and parents of each commit, newest first, the initial one last."""
        repository = self._get(id, type)
        return [
            {
                "oid": commit.oid,
                "title": commit.title,
                "message": commit.message,
                "author": commit.author,
                "parents": list(commit.parents),
            }
            for commit in repository.history(repository.commit_at(revision))
        ]

    def refs(self, id: str, type: str = "model") -> dict[str, str]:
        """Every ref (refs/heads/..., refs/tags/..., refs/pr/...) with its commit."""
        return dict(self._get(id, type).refs)

    def discussions(self, id: str, type: str = "model") -> list[dict[str, Any]]:
        """Number, title, status, author, isPullRequest of each, oldest first."""
        return [discussion.summary(id, type) for discussion in self._get(id, type).discussions.values()]

    def configure(self, **settings: int) -> None:
        """Set sizes of pages and parts by name (see `Settings`)."""
        for name, value in settings.items():
            getattr(self.state.settings, name)
            setattr(self.state.settings, name, value)

    def _get(self, id: str, type: str) -> Repository:
        return self.state.store.get(id, type)
