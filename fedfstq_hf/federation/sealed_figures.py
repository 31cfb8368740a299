"""What a sealed federation's public records do not show of single clients: examples, weight, norm and scale.

They say what a client has and how much its training moved. Only the coordinator needs them again: to take previews
back as they were counted. So it seals them to its own key, and the record carries the box.
"""

from __future__ import annotations

import base64
import dataclasses
import json
from typing import Any

from fedfstq_hf.errors import MailboxError, MessageError
from fedfstq_hf.federation import keys
from fedfstq_hf.federation.record import FIGURES, AcceptedUpdate, RoundRecord
from fedfstq_hf.federation.server.screening import Unseal
from fedfstq_hf.federation.untrusted import parse_object

_ENTRIES = ("accepted", "refinements")
_MAX_BYTES = 10**8


def seal_figures(record: RoundRecord, seal_key: str) -> RoundRecord:
    """The record with its figures in a box as well; `RoundRecord.to_json` then writes them nowhere else."""
    content: dict[str, Any] = {
        name: [[getattr(update, figure) for figure in FIGURES] for update in getattr(record, name)] for name in _ENTRIES
    }
    content["adapter"] = record.adapter_sha256  # no box of another record
    box = keys.seal(seal_key, json.dumps(content, separators=(",", ":")).encode())
    return dataclasses.replace(record, sealed=base64.b64encode(box).decode())


def open_figures(record: RoundRecord, unseal: Unseal) -> RoundRecord:
    """The record with the figures from its box; as it is where it has none.

    Raises:
        MailboxError: the box is damaged, of another record, or sealed to another key.
    """
    if record.sealed is None:
        return record
    what = f"The box of figures in the record of round {record.round}"
    try:
        content = parse_object(unseal(base64.b64decode(record.sealed, validate=True)), what, max_bytes=_MAX_BYTES)
        if content["adapter"] != record.adapter_sha256:
            raise ValueError("it is another record's")
        opened: dict[str, Any] = {name: _with_figures(getattr(record, name), content[name]) for name in _ENTRIES}
    except (MessageError, ValueError, KeyError, TypeError) as error:
        raise MailboxError(
            f"{what} cannot be opened: {error}. Restore the record from the mailbox's history."
        ) from error
    return dataclasses.replace(record, **opened)


def _with_figures(updates: tuple[AcceptedUpdate, ...], rows: list[list[Any]]) -> tuple[AcceptedUpdate, ...]:
    if any(type(value) not in (int, float) or value < 0 for row in rows for value in row):
        raise ValueError("it holds something else than figures")
    return tuple(
        dataclasses.replace(update, **dict(zip(FIGURES, row, strict=True)))
        for update, row in zip(updates, rows, strict=True)
    )
