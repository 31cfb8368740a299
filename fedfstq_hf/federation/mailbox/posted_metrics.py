"""Metrics as anybody may have posted them, and what of them is believed: names that can be read, values in bounds."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from fedfstq_hf.federation.mailbox.protocol import Mailbox
from fedfstq_hf.text import printable

logger = logging.getLogger(__name__)

MAX_FILE_BYTES = 10**5
"""Of what one source posted for one round."""
MAX_SOURCES, MAX_OF_CLIENT, MAX_METRICS = 256, 4, 64
"""Sources of a round that name no client, sources of one client, metrics of a source; the first by name are taken."""
MAX_NAME = 64
MAX_VALUE, MAX_WHOLE = 1e30, 2**53
_MAX_SOURCE = 2 * MAX_NAME + 1  # SOURCE@CLIENT

Metrics = dict[int, dict[str, dict[str, Any]]]
"""Round -> source, which names an evaluation set -> name -> value."""


def read_metrics(
    mailbox: Mailbox, clients: Sequence[str] = (), *, up_to: int
) -> dict[int, dict[str, dict[str, float]]]:
    """What was posted for rounds 0 to `up_to`, without what is no metric: that is counted in the log.

    A name has 1 to `MAX_NAME` visible characters; a value is finite and at most `MAX_VALUE`, a whole one `MAX_WHOLE`.
    """
    kept: dict[int, dict[str, dict[str, float]]] = {}
    dropped = 0
    found = mailbox.read_metrics(clients)
    for round in sorted(round for round in found if 0 <= round <= up_to):
        of_client: Counter[str] = Counter()
        for source, posted in sorted(found[round].items(), key=lambda item: str(item[0])):
            values = _values(posted) if _is_shown(source, _MAX_SOURCE) else {}
            client = source.rpartition("@")[2] if values and "@" in source else ""
            of_client[client] += bool(values)
            if of_client[client] > (MAX_OF_CLIENT if client else MAX_SOURCES):
                values = {}
            dropped += len(posted) - len(values)
            if values:
                kept.setdefault(round, {})[source] = values
    if dropped:
        logger.warning("%d posted metrics are left out: their names or values are none, or they are too many.", dropped)
    return kept


def _values(posted: Mapping[str, Any]) -> dict[str, float]:
    good = {name: float(value) for name, value in posted.items() if _is_shown(name, MAX_NAME) and _is_value(value)}
    return dict(sorted(good.items())[:MAX_METRICS])


def _is_shown(name: object, limit: int) -> bool:
    return isinstance(name, str) and 0 < len(name) <= limit and printable(name) == name == name.strip()


def _is_value(value: object) -> bool:
    match value:
        case bool():
            return False
        case int():
            return abs(value) <= MAX_WHOLE
        case float():
            return math.isfinite(value) and abs(value) <= MAX_VALUE
        case _:
            return False


def posted_losses(metrics: Mapping[int, Mapping[str, Mapping[str, Any]]]) -> list[tuple[int, float]]:
    """(round, mean `eval_loss` over the sources that posted one), oldest first.

    Args:
        metrics: as `Mailbox.read_metrics` returns them.
    """
    losses = []
    for round in sorted(metrics):
        values = [source.get("eval_loss") for source in metrics[round].values()]
        numbers = [float(value) for value in values if isinstance(value, (int, float))]
        if numbers:
            losses.append((round, sum(numbers) / len(numbers)))
    return losses
