"""Sending what follows a message, while the client waits or trains on."""

from __future__ import annotations

import logging
import threading

from fedfstq_hf.errors import MailboxError
from fedfstq_hf.federation.mailbox.protocol import Mailbox

logger = logging.getLogger(__name__)


class Following:
    """Posts a client's refinements in the background, one at a time.

    One that cannot be sent costs accuracy, no more: the round goes on with the preview.
    """

    def __init__(self, mailbox: Mailbox, client_id: str) -> None:
        self._mailbox = mailbox
        self._client_id = client_id
        self._thread: threading.Thread | None = None
        self._newest = -1

    def start(self, round: int, refinement: bytes) -> None:
        """Begin to send the refinement of `round`, unless that was begun before."""
        if round <= self._newest:
            return
        self.wait()
        self._newest = round
        # a daemon: who stops the client does not wait for it
        self._thread = threading.Thread(target=self._post, args=(round, refinement), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until it is sent, or given up."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _post(self, round: int, refinement: bytes) -> None:
        try:
            self._mailbox.post_update(round, self._client_id, refinement, refinement=True)
        except MailboxError as error:
            logger.warning("The refinement of round %d could not be sent: %s", round, error)
