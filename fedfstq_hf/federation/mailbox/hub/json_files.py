"""The small JSON files of a federation's repos: layout, metrics, and what is read of a round record."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from typing import Any

from fedfstq_hf.errors import MailboxError
from fedfstq_hf.federation import record
from fedfstq_hf.federation.mailbox.hub.sizes import MAX_LAYOUT_BYTES
from fedfstq_hf.federation.mailbox.protocol import is_name
from fedfstq_hf.federation.untrusted import parse_object
from fedfstq_hf.text import printable

logger = logging.getLogger(__name__)

_LAYOUT_FORMAT = 1
_LARGEST_METRIC = 1e30
"""Sums and squares of what is plotted stay finite."""
_METRIC = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_ ./@-]{0,63}")
_ROUND = re.compile(r"[0-9]{1,9}")


def dump(value: Any) -> bytes:
    """Readable JSON with sorted keys."""
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def layout_file(name: str) -> bytes:
    """The file that names a federation's layout."""
    return dump({"format": _LAYOUT_FORMAT, "layout": name})


def layout_in(data: bytes) -> str | None:
    """The layout that the file names; None if it is of another version.

    Raises:
        MailboxError: it cannot be read.
    """
    fields = parse_object(data, "The layout file", max_bytes=MAX_LAYOUT_BYTES)
    name = fields.get("layout")
    return name if fields.get("format") == _LAYOUT_FORMAT and isinstance(name, str) else None


def round_in(data: bytes | None, address: str) -> int:
    """The round that a record is of. Raises `MailboxError` if it is none."""
    fields = parse_object(data or b"", f"The round record of {address}", max_bytes=record.MAX_BYTES)
    round = fields.get("round")
    if not isinstance(round, int) or isinstance(round, bool) or round < 0:
        raise MailboxError(f"The round record of {address} names round {printable(round, 40)}.")
    return round


def parse_metrics(data: bytes | None, whose: str, *, max_bytes: int) -> dict[int, dict[str, dict[str, Any]]]:
    """Posted metrics: round -> source -> name -> number.

    Whoever may write the file may have written anything, so what is no metric is left out, with a warning.

    Args:
        whose: completes "The metrics of ...", for the warning.
    """
    if data is None:
        return {}
    try:
        fields = parse_object(data, f"The metrics of {whose}", max_bytes=max_bytes)
    except MailboxError as error:
        logger.warning("%s They are left out.", error)
        return {}
    found: dict[int, dict[str, dict[str, Any]]] = {}
    dropped = 0
    for round, sources in fields.items():
        if not _ROUND.fullmatch(round) or not isinstance(sources, dict):
            dropped += 1
            continue
        for source, values in sources.items():
            if not is_name(source) or not isinstance(values, dict):
                dropped += 1
                continue
            numbers = {name: value for name, value in values.items() if _METRIC.fullmatch(name) and _is_number(value)}
            dropped += len(values) - len(numbers)
            found.setdefault(int(round), {})[source] = numbers
    if dropped:
        logger.warning("The metrics of %s: %d entries are no metrics; they are left out.", whose, dropped)
    return found


def with_metric(data: bytes | None, round: int, source: str, metrics: Mapping[str, Any], *, max_bytes: int) -> bytes:
    """The file with one more metric in it.

    Raises:
        MailboxError: a value is not a number that a reader takes.
    """
    for name, value in metrics.items():
        if not _METRIC.fullmatch(name) or not _is_number(value):
            raise MailboxError(
                f"{printable(name, 80)} = {printable(value, 40)} of {source} cannot be posted: expected a finite "
                f"number of at most {_LARGEST_METRIC:g}, named by letters, digits and '_'."
            )
    found = parse_metrics(data, "this repo so far", max_bytes=max_bytes)
    found.setdefault(round, {})[source] = dict(metrics)
    return dump({str(round): sources for round, sources in sorted(found.items())})


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST_METRIC
