"""What a client sends: the pending message of its session, a refinement behind it, and at the end an attachment."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from torch import Tensor

from fedfstq_hf.codec import message
from fedfstq_hf.errors import MailboxError, MailboxUnavailableError
from fedfstq_hf.federation.client.outbox import Pending
from fedfstq_hf.federation.client.session import ClientSession, says_nothing_yet
from fedfstq_hf.federation.mailbox.protocol import SALIENCY_FILE, Mailbox
from fedfstq_hf.federation.record import RoundRecord

logger = logging.getLogger(__name__)

PackSaliency = Callable[[dict[str, Tensor]], bytes | None]
"""Packs the token sensitivities that a session carries; None where there are none."""


class Uplink:
    """Posts to a mailbox for one client.

    Args:
        mailbox: where the federation lives.
        session: holds what is sent.
        record: round -> its record.
        saliency: for a client that agrees to share its token sensitivities; they are sent once, with the last round's
            message, and only if the federation's spec asks for them.

    Attributes:
        attached_bytes: size of the attachment; 0 before it was sent.
    """

    def __init__(
        self,
        mailbox: Mailbox,
        session: ClientSession,
        record: Callable[[int], RoundRecord],
        saliency: PackSaliency | None = None,
    ) -> None:
        self.attached_bytes = 0
        self.saliency = saliency
        self.background = BackgroundUpload(mailbox, session.client_id)
        self._mailbox = mailbox
        self._session = session
        self._record = record
        self._posted_round = -1

    def send(self, newest: RoundRecord) -> None:
        """Send the pending message, for at most as long as the round is open: by then it is late anyway."""
        pending = self._session.pending
        if pending is None or pending.round == self._posted_round:
            return
        self.background.wait()  # it has the uplink
        patience = None
        if newest.deadline is not None and newest.round == pending.round:  # by durations: clocks may differ
            patience = newest.deadline - newest.opened_at
        try:
            self._attach(pending.round)
            if not says_nothing_yet(pending):
                self._mailbox.post_update(pending.round, self._session.client_id, pending.message, patience=patience)
        except MailboxUnavailableError as error:
            if patience is None:
                raise
            logger.warning("The update of round %d could not be sent in time: %s", pending.round, error)
            return
        self._posted_round = pending.round
        self.follow(pending)

    def follow(self, pending: Pending) -> None:
        """Begin to send a message's refinement, if it has one and that was not begun before."""
        if pending.refinement is not None:
            self.background.start(pending.round, pending.refinement)

    def _attach(self, round: int) -> None:
        """Send the token sensitivities, once, before the last message: who reads that finds them."""
        session = self._session
        if self.saliency is None or not session.spec.share_saliency or round != session.spec.rounds - 1:
            return
        data = self.saliency(session.carried)
        if data is None:
            return
        try:
            header = message.attachment_header(
                SALIENCY_FILE,
                client_id=session.client_id,
                round=round,
                base=self._record(round).adapter_digest,
                schema=session.schema.fingerprint,
            )
            sent = session.envelope(header, data)
            self._mailbox.post_attachment(session.client_id, SALIENCY_FILE, sent)
            self.attached_bytes = len(sent)
        except MailboxError as error:  # the update must not wait for it
            logger.warning("The token sensitivities could not be sent: %s", error)


class BackgroundUpload:
    """Posts a client's refinements while it waits or trains on, one at a time.

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
