"""Publishing: the coordinator's compare-and-swap. One commit per round, on top of the commit it was made from."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fedfstq_hf.errors import MailboxError, RoundConflictError
from fedfstq_hf.federation.mailbox.hub.repo import HeadMovedError, HubRepo, additions
from fedfstq_hf.federation.mailbox.hub.sizes import read_global
from fedfstq_hf.federation.mailbox.hub.waiting import Outcome, diagnose
from fedfstq_hf.federation.mailbox.protocol import CARD_FILE

logger = logging.getLogger(__name__)

Reader = Callable[[str], bytes | None]
"""Reads a path at the commit that the new one is put on top of."""


@dataclass
class Swap:
    """One commit that must come directly after what it was made from.

    Attributes:
        parent: the commit it is put on top of; None to ask for the newest.
        files: path -> content, made from what stands at the parent.
        check: says whether what stands at a newer parent is the commit already made (True), lets it be made on top
            (False), or raises.
    """

    repo: HubRepo
    message: str
    files: Callable[[Reader], Mapping[str, bytes]]
    check: Callable[[Reader], bool]
    parent: str | None = None

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
