"""What clients send beside their updates, and how the coordinator joins it.

An attachment is a file in a message's container, so it is signed and sealed as messages are, and bound to its client,
round and name.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from fedfstq_hf.codec.message import MAX_CONTAINER
from fedfstq_hf.errors import FedFSTQError, MailboxError, MailboxUnavailableError, MessageError
from fedfstq_hf.federation.keys import SEAL_OVERHEAD
from fedfstq_hf.federation.mailbox.protocol import SALIENCY_FILE, Mailbox
from fedfstq_hf.federation.record import AcceptedUpdate, RoundRecord
from fedfstq_hf.federation.server.screening import Screening
from fedfstq_hf.text import printable, printable_traceback

logger = logging.getLogger(__name__)

MAX_BYTES = 2 * 10**6
"""Of an attached file; what it travels in comes on top."""

SaliencyMaker = Callable[[Sequence[tuple[bytes, float]]], Mapping[str, bytes]]
"""Joins token sensitivities, each with its weight, into the files that are published at the root.

It raises a `FedFSTQError` that says why, where nothing may be published.
"""


@dataclass(frozen=True)
class Joined:
    """What became of attachments.

    Attributes:
        files: to publish at the root.
        unpublished: why there are no files although clients sent some; empty otherwise.
    """

    files: Mapping[str, bytes]
    unpublished: str = ""


def sent_bytes(mailbox: Mailbox, clients: Iterable[str]) -> int:
    """What these clients sent beside their updates, whether it can be used, and whether anybody reads it, or not."""
    total = 0
    for client_id in clients:
        try:
            total += mailbox.attachment_bytes(client_id, SALIENCY_FILE)
        except MailboxUnavailableError:
            raise
        except MailboxError as error:  # nobody waits for a count
            logger.warning("The attachment of client %s is not counted: %s", client_id, printable(error))
    return total


def join_attachments(
    mailbox: Mailbox,
    record: RoundRecord,
    accepted: Iterable[AcceptedUpdate],
    screening: Screening,
    join: SaliencyMaker,
) -> Joined:
    """Join the token sensitivities of the clients whose updates are used.

    Args:
        record: of the open round, which attachments must be for.
        accepted: the updates that are used.
        screening: opens attachments.
        join: makes the files to publish.
    """
    found: list[tuple[bytes, float]] = []
    sent = False
    for entry in accepted:
        client = entry.client_id
        try:
            data = mailbox.read_attachment(client, SALIENCY_FILE, max_bytes=MAX_BYTES + MAX_CONTAINER + SEAL_OVERHEAD)
            if data is None:
                continue
            sent = True
            file = screening.open_attachment(
                client, SALIENCY_FILE, data, round=record.round, base=record.adapter_digest, max_bytes=MAX_BYTES
            )
        except MailboxUnavailableError:
            raise
        except (MailboxError, MessageError) as error:
            logger.warning("The attachment of client %s is left out: %s", client, printable(error))
            continue
        found.append((file, entry.weight))
    if not sent:
        return Joined({})
    try:
        files = join_apart(join, found)
    except FedFSTQError as error:  # the round does not wait for it
        logger.warning("No token sensitivities are published: %s", printable(error))
        return Joined({}, printable(error))
    return Joined(files, "" if files else "They cannot be joined; the coordinator's log says why.")


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
