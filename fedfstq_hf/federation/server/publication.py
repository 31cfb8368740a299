"""What a coordinator publishes: the round record, and the files at the mailbox's root."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedfstq_hf.codec import Schema
from fedfstq_hf.errors import MailboxError, MailboxUnavailableError
from fedfstq_hf.federation import adapter_file, history
from fedfstq_hf.federation.envelope import seal_figures, sign_record
from fedfstq_hf.federation.keys import Sign
from fedfstq_hf.federation.mailbox.protocol import CARD_FILE, HISTORY_FILE, RootFiles, RootReader
from fedfstq_hf.federation.record import RoundRecord
from fedfstq_hf.federation.spec import FederationSpec
from fedfstq_hf.text import printable, printable_traceback

logger = logging.getLogger(__name__)

MAX_CARD_BYTES = 10**6


@dataclass(frozen=True)
class RoundFacts:
    """What a card is made from: see `fedfstq_hf.reporting.card.federation_card`."""

    spec: FederationSpec
    record: RoundRecord
    history: Sequence[history.HistoryRow]
    metrics: Mapping[int, Mapping[str, Mapping[str, Any]]]
    adapter_config: Mapping[str, Any]
    existing_card: bytes | None


CardMaker = Callable[[RoundFacts], Mapping[str, bytes]]
"""Makes the root's readable files from a round; the federation itself knows no plots and no templates."""


def root_files(
    spec: FederationSpec,
    record: RoundRecord,
    rows: Sequence[history.HistoryRow],
    metrics: Mapping[int, Mapping[str, Mapping[str, Any]]],
    adapter_config: bytes,
    card: CardMaker | None,
    attached: Mapping[str, bytes] | None = None,
) -> RootFiles:
    """What makes the root's files of a round, from what stands there.

    A card that cannot be made holds up no round: what stands there stays.
    """

    def files(read: RootReader) -> dict[str, bytes]:
        made = {HISTORY_FILE: history.dump(rows), **(attached or {})}
        if card is None:
            return made
        try:
            existing = read(CARD_FILE)
            if existing is not None and len(existing) > MAX_CARD_BYTES:
                raise MailboxError(f"{CARD_FILE} has {len(existing)} bytes, more than {MAX_CARD_BYTES}.")
        except MailboxUnavailableError:
            raise
        except MailboxError as error:
            logger.warning("The card is left as it is: %s", printable(error, 500))
            return made
        try:
            made.update(card(RoundFacts(spec, record, rows, metrics, json.loads(adapter_config), existing)))
        except Exception as error:
            logger.warning("No card was made for round %d:\n%s", record.round, printable_traceback(error))
        return made

    return files


def make_record(
    spec: FederationSpec,
    adapter: bytes,
    round: int,
    now: float,
    *,
    finished: bool = False,
    seconds: float | None = None,
    sign: Sign | None = None,
    **fields: Any,
) -> RoundRecord:
    """The record of an adapter to publish, sealed and signed as the spec says.

    seconds: until the round that it opens closes with fewer updates; None for no deadline.

    Raises:
        MailboxError: the adapter has not the spec's schema.
        ConfigError: records are signed, and there is no `sign`.
    """
    state = adapter_file.load(adapter)
    schema = Schema.from_state_dict(state)
    if schema.fingerprint != spec.schema:
        raise MailboxError("The adapter to publish has other names or shapes than the federation's spec says.")
    record = RoundRecord(
        round=round,
        adapter_sha256=hashlib.sha256(adapter).hexdigest(),
        adapter_digest=schema.digest(schema.flatten(state)),
        adapter_bytes=len(adapter),
        schema=schema.fingerprint,
        opened_at=now,
        deadline=None if seconds is None or finished else now + seconds,
        finished=finished,
        **fields,
    )
    if spec.sealing_key is not None and (record.accepted or record.refinements):
        record = seal_figures(record, spec.sealing_key)
    return sign_record(record, spec, sign)
