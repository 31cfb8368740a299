"""All repositories of the loopback Hub, by type and id."""

from __future__ import annotations

import threading

from tests.loopback_hub.errors import repository_not_found
from tests.loopback_hub.repository import Repository

TYPES = ("model", "dataset")


class Store:
    """Repositories in the order in which they were created."""

    def __init__(self) -> None:
        self._repositories: dict[tuple[str, str], Repository] = {}
        self._lock = threading.Lock()

    def create(self, id: str, type: str, creator: str, private: bool = False) -> tuple[Repository, bool]:
        """The repository and whether it is new."""
        with self._lock:
            present = self._repositories.get((type, id))
            if present is not None:
                return present, False
            self._repositories[type, id] = repository = Repository(id, type, creator, private)
            return repository, True

    def get(self, id: str, type: str = "model") -> Repository:
        """404 if there is none."""
        repository = self._repositories.get((type, id))
        if repository is None:
            raise repository_not_found()
        return repository

    def delete(self, id: str, type: str = "model") -> None:
        with self._lock:
            self._repositories.pop((type, id), None)

    def all(self, type: str = "model") -> list[Repository]:
        with self._lock:
            return [repository for (kind, _), repository in self._repositories.items() if kind == type]
