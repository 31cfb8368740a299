"""The small JSON files of a federation's repos: layout, metrics, and what is read of a round record."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from fedfstq_hf.errors import MailboxError

logger = logging.getLogger(__name__)

MAX_BYTES = 64 * 10**6
MAX_METRICS_BYTES = 10**6


def dump(value: Any) -> bytes:
    """Readable JSON with sorted keys."""
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def round_in(data: bytes | None, address: str) -> int:
    """The round that a record is of. Raises `MailboxError` if it is none."""
    try:
        round = json.loads(data or b"")["round"]
    except (ValueError, KeyError, TypeError) as error:
        raise MailboxError(f"The round record of {address} cannot be read: {error}") from error
    if not isinstance(round, int) or round < 0:
        raise MailboxError(f"The round record of {address} names round {round!r:.40}.")
    return round


def parse_metrics(data: bytes | None) -> dict[int, dict[str, dict[str, Any]]]:
    """Posted metrics; what cannot be understood is left out, since any client may have written it."""
    try:
        found = json.loads(data or b"{}")
        return {
            int(round): {str(source): dict(values) for source, values in sources.items()}
            for round, sources in found.items()
        }
    except (ValueError, TypeError, AttributeError, RecursionError):
        logger.warning("A file of posted metrics cannot be read; it is left out.")
        return {}


def with_metric(data: bytes | None, round: int, source: str, metrics: Mapping[str, Any]) -> bytes:
    """The file with one more metric in it."""
    found = parse_metrics(data)
    found.setdefault(round, {})[source] = dict(metrics)
    return dump({str(round): sources for round, sources in sorted(found.items())})
