"""`fedfstq serve | stop | rollback | evaluate`: a coordinator with the card and the key that a person's one has."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from fedfstq_hf.errors import no_federation
from fedfstq_hf.federation.key_files import coordinator_signer, coordinator_unseal
from fedfstq_hf.federation.mailbox.open import open_mailbox
from fedfstq_hf.federation.mailbox.protocol import ONE_SHOT_SECONDS, SPEC_FILE, Mailbox
from fedfstq_hf.federation.server.coordinator import Coordinator
from fedfstq_hf.federation.spec import FederationSpec
from fedfstq_hf.reporting.card.federation_card import card_maker


def open_federation(address: str, patience: float = ONE_SHOT_SECONDS) -> tuple[Mailbox, FederationSpec]:
    """The mailbox at an address, and the spec of the federation in it.

    Args:
        patience: seconds for which a mailbox that does not answer is asked again.

    Raises:
        MailboxError: no federation lies there.
    """
    mailbox = open_mailbox(address, patience=patience)
    if mailbox.head() is None:
        raise no_federation(address)
    return mailbox, FederationSpec.from_json(mailbox.read(0, SPEC_FILE))


def make_coordinator(
    address: str,
    *,
    key_file: str | os.PathLike[str] | None = None,
    reads_messages: bool = True,
    publishes: bool = True,
    patience: float = ONE_SHOT_SECONDS,
    stays: bool = False,
) -> Coordinator:
    """The coordinator of a federation, which renews the card with every round.

    Args:
        key_file: opens sealed messages, and signs records.
        reads_messages: False for one that will close no round, and so opens none.
        publishes: False for one that only renews the card, and so signs no record.
        patience: of its first look, in seconds; and of all, unless it `stays`: then the spec's.
    """
    mailbox, spec = open_federation(address, patience)
    if stays:
        mailbox.set_patience(spec.patience)
    unseal = coordinator_unseal(address, spec, key_file) if reads_messages else None
    sign = coordinator_signer(address, spec, key_file) if publishes else None
    return Coordinator(mailbox, card=card_maker(address), unseal=unseal, sign=sign, saliency=_join_saliency)


def _join_saliency(files: Sequence[tuple[bytes, float]]) -> Mapping[str, bytes]:
    from fedfstq_hf.generation.shared_saliency import join_saliency  # only federations that share it pay for the import

    return join_saliency(files)
