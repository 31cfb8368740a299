"""Earlier rounds in the global repo's tags and commits, and old ones in a shared repo, which are removed."""

from __future__ import annotations

import os

from huggingface_hub import CommitOperationDelete

from fedfstq_hf.errors import MailboxError
from fedfstq_hf.federation.hub import address as paths
from fedfstq_hf.federation.hub import json_files
from fedfstq_hf.federation.hub.repo import HubRepo

TIDYING_SECONDS = 30.0
TIDY_EVERY = 10
"""Rounds between two deletions of old messages in a shared repo."""
_SQUASH_COMMITS = 500


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
    for commit in named:
        file = repo.read(paths.HEAD_PATH, revision=commit, max_bytes=json_files.MAX_BYTES)
        if file is not None and json_files.round_in(file.data, repo.repo_id) == round:
            return commit
    raise MailboxError(
        f"{repo.repo_id} no longer holds round {round}: its history was squashed. Rounds with a tag are kept; there "
        f"are {', '.join(tag.name for tag in tags) or 'none'}."
    )


def tidy(repo: HubRepo, round: int, clients: int, keep_rounds: int) -> None:
    """Remove messages of rounds that nobody asks for any more, and now and then the history that still holds them."""
    oldest = round - keep_rounds
    entries = repo.call(
        "list the rounds of",
        lambda: [entry.path for entry in repo.api.list_repo_tree(repo.repo_id, "rounds")],
        seconds=TIDYING_SECONDS,
    )
    old = [path for path in entries if os.path.basename(path).isdigit() and int(os.path.basename(path)) < oldest]
    if old:
        deletions = [CommitOperationDelete(f"{path}/", is_folder=True) for path in old]
        repo.call("tidy", lambda: repo.commit_once(deletions, f"Rounds before {oldest}"), seconds=TIDYING_SECONDS)
    if round % max(TIDY_EVERY, _SQUASH_COMMITS // (clients + 1)) < TIDY_EVERY:
        repo.call("squash", lambda: repo.api.super_squash_history(repo.repo_id), seconds=TIDYING_SECONDS)


def _tag_name(round: int) -> str:
    return f"round-{round:06d}"
