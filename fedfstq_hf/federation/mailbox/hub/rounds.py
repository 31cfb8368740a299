"""Earlier rounds in the global repo's tags and commits, and old ones in a shared repo, which are removed."""

from __future__ import annotations

import logging
from collections import defaultdict

from huggingface_hub import CommitOperationDelete
from huggingface_hub.hf_api import RepoFile

from fedfstq_hf.errors import MailboxError
from fedfstq_hf.federation.mailbox.hub import address as paths
from fedfstq_hf.federation.mailbox.hub import json_files
from fedfstq_hf.federation.mailbox.hub.ownership import SQUASH_TITLE, Marker, read_marker, strangers_work
from fedfstq_hf.federation.mailbox.hub.places import is_ours
from fedfstq_hf.federation.mailbox.hub.repo import HubRepo
from fedfstq_hf.federation.mailbox.hub.sizes import read_global

logger = logging.getLogger(__name__)

TIDYING_SECONDS = 30.0
TIDY_EVERY = 10
"""Rounds between two deletions of old messages in a shared repo."""
_SQUASH_COMMITS = 500
_MOST_CANDIDATES = 20  # commits that say they are of one round; a rollback or a lost answer makes a second one


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
        if file is not None and json_files.round_in(file.data, repo.repo_id) == round:
            return commit
    raise MailboxError(
        f"{repo.repo_id} no longer holds round {round}: its history was squashed. Rounds with a tag are kept; there "
        f"are {', '.join(tag.name for tag in tags) or 'none'}."
    )


def tidy(repo: HubRepo, marker: Marker, round: int, clients: int, keep_rounds: int) -> None:
    """Remove messages of rounds that nobody asks for any more, and now and then the history that still holds them.

    Only what this package wrote is removed, and no history that somebody else is part of.
    """
    there = read_marker(repo)
    if there is None or not there.same(marker):
        logger.warning("%s is not tidied: it was not made for this federation.", repo.repo_id)
        return
    oldest = round - keep_rounds
    entries = repo.call(
        "list the rounds of",
        lambda: list(repo.api.list_repo_tree(repo.repo_id, "rounds", recursive=True)),
        seconds=TIDYING_SECONDS,
    )
    files = [entry.path for entry in entries if isinstance(entry, RepoFile)]
    if old := _old_folders(files, oldest):
        deletions = [CommitOperationDelete(f"{folder}/", is_folder=True) for folder in old]
        repo.call("tidy", lambda: repo.commit_once(deletions, f"Rounds before {oldest}"), seconds=TIDYING_SECONDS)
    if round % max(TIDY_EVERY, _SQUASH_COMMITS // (clients + 1)) < TIDY_EVERY:
        squash(repo, marker, account=None)


def squash(repo: HubRepo, marker: Marker, *, account: str | None) -> bool:
    """Replace the history of a repo that has only this package's work in it by one commit; says whether it was done.

    Args:
        account: the only one that wrote there, None where all clients do.

    Raises:
        MailboxError: the Hub did not do it.
    """
    reason = strangers_work(repo, marker, account)
    if reason is not None:
        logger.warning("The history of %s is kept as it is: %s.", repo.repo_id, reason)
        return False
    repo.call(
        "squash the history of",
        lambda: repo.api.super_squash_history(repo.repo_id, commit_message=SQUASH_TITLE),
        seconds=TIDYING_SECONDS,
    )
    return True


def _old_folders(files: list[str], oldest: int) -> list[str]:
    """Folders of rounds before `oldest` in which this package wrote everything."""
    folders: dict[str, list[str]] = defaultdict(list)
    for path in files:
        folders["/".join(path.split("/")[:2])].append(path)
    ours = {folder for folder, inside in folders.items() if all(is_ours(path, shared=True) for path in inside)}
    return sorted(folder for folder in ours if int(folder.removeprefix("rounds/")) < oldest)


def _tag_name(round: int) -> str:
    return f"round-{round:06d}"
