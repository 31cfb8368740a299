"""What clients send beside their updates, and how the coordinator joins it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence

from fedfstq_hf.errors import FedFSTQError, MailboxError, MailboxUnavailableError, MessageError
from fedfstq_hf.federation.mailbox import SALIENCY_FILE, Mailbox
from fedfstq_hf.federation.record import AcceptedUpdate
from fedfstq_hf.text import printable, printable_traceback

logger = logging.getLogger(__name__)

MAX_BYTES = 2 * 10**6

SaliencyMaker = Callable[[Sequence[tuple[bytes, float]]], Mapping[str, bytes]]
"""Joins token sensitivities, each with its weight, into the files that are published at the root."""


def join_attachments(
    mailbox: Mailbox, accepted: Iterable[AcceptedUpdate], join: SaliencyMaker
) -> tuple[Mapping[str, bytes], int]:
    """The joined token sensitivities of the clients whose updates are used, and the bytes they sent for it."""
    found: list[tuple[bytes, float]] = []
    for entry in accepted:
        try:
            data = mailbox.read_attachment(entry.client_id, SALIENCY_FILE, max_bytes=MAX_BYTES)
        except MailboxUnavailableError:
            raise
        except (MailboxError, MessageError) as error:
            logger.warning("The attachment of client %s is left out: %s", entry.client_id, printable(error))
            continue
        if data is not None:
            found.append((data, entry.weight))
    return (join_apart(join, found) if found else {}), sum(len(data) for data, _ in found)


def join_apart(join: SaliencyMaker, files: Sequence[tuple[bytes, float]]) -> Mapping[str, bytes]:
    """What `join` makes of the files; where it fails on some of them, of the others; nothing where that fails too.

    Raises:
        FedFSTQError: `join` says why nothing may be published.
    """
    try:
        return join(files)
    except FedFSTQError:
        raise
    except Exception as error:  # a fault of ours that one client found must not stop the round
        logger.warning("Token sensitivities cannot be joined; each is tried apart:\n%s", printable_traceback(error))
    good = [file for place, file in enumerate(files) if not _breaks(join, file, place)]
    try:
        return join(good) if good else {}
    except FedFSTQError:
        raise
    except Exception as error:
        logger.warning("No token sensitivities are published:\n%s", printable_traceback(error))
        return {}


def _breaks(join: SaliencyMaker, file: tuple[bytes, float], place: int) -> bool:
    try:
        join([file])
    except FedFSTQError:
        return False  # one alone may be too few
    except Exception as error:
        logger.warning("Attachment number %d is left out: %s", place + 1, printable(error))
        return True
    return False
