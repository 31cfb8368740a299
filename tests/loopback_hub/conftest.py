"""The fixtures of tests/loopback_hub/fixtures.py, and a client with a repository for the loopback Hub's own tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi

from tests.loopback_hub.fixtures import hub, hub_client, hub_here, remote_hub
from tests.loopback_hub.loopback import LoopbackHub

__all__ = ["hub", "hub_client", "hub_here", "remote_hub"]


@pytest.fixture
def client(hub: LoopbackHub, hub_client: Callable[..., HfApi]) -> HfApi:
    """The real client of ann, who may write everywhere in the organisation lab."""
    return hub_client(hub.user("ann", "write", org="lab"))


@pytest.fixture
def run(client: HfApi) -> str:
    """An empty public model repository, lab/run."""
    return client.create_repo("lab/run").repo_id


def push(client: HfApi, repo: str, **files: bytes) -> CommitInfo:
    """Commit files, given by path, with new operations."""
    operations = [CommitOperationAdd(path, content) for path, content in files.items()]
    return client.create_commit(repo, operations, commit_message="push")
