"""What clients send beside their updates, and how the coordinator joins it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence

from fedfstq_hf.errors import MailboxError, MailboxUnavailableError, MessageError
from fedfstq_hf.federation.mailbox import SALIENCY_FILE, Mailbox
from fedfstq_hf.federation.record import AcceptedUpdate
from fedfstq_hf.text import printable

logger = logging.getLogger(__name__)

MAX_BYTES = 2 * 10**6

SaliencyMaker = Callable[[Sequence[tuple[bytes, float]]], Mapping[str, bytes]]
"""Joins token sensitivities, each with its weight, into the files that are published at the root."""


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


def join_attachments(mailbox: Mailbox, accepted: Iterable[AcceptedUpdate], join: SaliencyMaker) -> Mapping[str, bytes]:
    """The joined token sensitivities of the clients whose updates are used."""
    found: list[tuple[bytes, float]] = []
    for entry in accepted:
        try:
            data = mailbox.read_attachment(entry.client_id, SALIENCY_FILE, max_bytes=MAX_BYTES)
        except MessageError as error:
            logger.warning("The attachment of client %s is left out: %s", entry.client_id, error)
            continue
        if data is not None:
            found.append((data, entry.weight))
    return join(found) if found else {}
