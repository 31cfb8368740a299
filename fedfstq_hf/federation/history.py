"""The history of a federation: one short row per round, so that reports need not read every round record again."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from fedfstq_hf.errors import MailboxError, MailboxUnavailableError
from fedfstq_hf.federation.mailbox.protocol import HISTORY_FILE, RootReader
from fedfstq_hf.federation.record import RefusedUpdate, RoundRecord
from fedfstq_hf.text import parse_object, printable

logger = logging.getLogger(__name__)

_MAX_REASONS = 8
_MAX_REASON_LENGTH = 60
_READ = 500
"""Of a reason no more characters are looked at."""
_OTHER = "other reasons"
_MAX_LINE = 10_000
_CLASS = re.compile(r"[A-Za-z][A-Za-z ,.'-]{0,59}")

# The first pattern that a reason contains names its class; what stands in none keeps its own words, without values.
_REASONS = (
    (r"not enrolled", "not enrolled"),
    (r"not selected", "not selected for the round"),
    (r"takes at most|at most \d+ (were allowed|are taken)", "too large"),
    (r"names client|another client|signed by", "not from the client it names"),
    (r"names round", "for another round"),
    (r"names base adapter|wrong base", "based on another adapter"),
    (r"names schema|for schema", "for an adapter of another shape"),
    (r"names codec", "another codec"),
    (r"format version", "from another package version"),
    (r"signature|not signed|verify key", "signature missing or wrong"),
    (r"sealed", "sealing missing or wrong"),
    (r"replay|already (used|counted)", "sent before"),
    (r"not finite|\bnan\b|infinity", "not finite"),
    (r"num_examples|trained on", "implausible number of examples"),
    (r"digest|damaged|altered", "damaged"),
    (r"^message |payload|entropy-coded", "malformed"),
)


@dataclass(frozen=True)
class HistoryRow:
    """What a round cost. Bytes are totals over all clients, except for the downlink, which is one client's.

    Attributes:
        round: 0 is the initial adapter.
        opened_at: seconds since the epoch by the coordinator's clock.
        num_examples: training examples behind the accepted updates; None in a sealed federation, where the totals of
            rounds with different clients would tell those of single clients.
        uplink_bytes: all that arrived for this round: accepted, refused and late messages, refinements, attachments.
        dense_uplink_bytes: what as many plain adapter files would have weighed.
        downlink_bytes: what a client that follows every round downloads: the packed change where it was published,
            else the adapter file; with it the control variate, where there is one.
        dense_downlink_bytes: the adapter file.
        accepted, refused, late: numbers of updates; refinements are not among them.
        reasons: class of reason -> number of updates refused for it.
        restored_from: the round whose adapter this one took over, None for a round made from updates.
        clipped: accepted updates that were scaled down for their norm; None in a sealed federation.
        refinements_unused: refinements that were refused or late. Where their previews were used, those alone count.
    """

    round: int
    opened_at: float
    num_examples: int | None
    uplink_bytes: int
    dense_uplink_bytes: int
    downlink_bytes: int
    dense_downlink_bytes: int
    accepted: int = 0
    refused: int = 0
    late: int = 0
    reasons: Mapping[str, int] = field(default_factory=dict)
    restored_from: int | None = None
    clipped: int | None = 0
    refinements_unused: int = 0


_DEFAULTS: Mapping[str, object] = {
    "accepted": 0,
    "refused": 0,
    "late": 0,
    "reasons": {},
    "restored_from": None,
    "clipped": 0,
    "refinements_unused": 0,
}


def row(record: RoundRecord, previous: RoundRecord | None) -> HistoryRow:
    """The row of a published round; `previous` is the record of the round before it, None for round 0 alone.

    Raises:
        MailboxError: `previous` is not the round before.
    """
    given = None if previous is None else previous.round
    if given != (record.round - 1 if record.round else None):
        raise MailboxError(f"The row of round {record.round} needs the record of the round before it, not of {given}.")
    refused, late = (_first_messages(updates) for updates in (record.refused, record.late))
    messages = len(record.accepted) + len(refused) + len(late)
    return HistoryRow(
        round=record.round,
        opened_at=record.opened_at,
        num_examples=None if record.sealed else sum(update.num_examples for update in record.accepted),
        uplink_bytes=record.uplink_bytes,
        dense_uplink_bytes=0 if previous is None else previous.adapter_bytes * messages,
        downlink_bytes=record.variate_bytes + record.path_from(record.round - 1).num_bytes,
        dense_downlink_bytes=record.adapter_bytes,
        accepted=len(record.accepted),
        refused=len(refused),
        late=len(late),
        reasons=_fewest(Counter(reason_class(update.reason) for update in refused)),
        restored_from=record.restored_from,
        clipped=None if record.sealed else sum(update.scale < 1 for update in record.accepted),
        refinements_unused=len(record.refused) + len(record.late) - len(refused) - len(late),
    )


def _first_messages(updates: Sequence[RefusedUpdate]) -> list[RefusedUpdate]:
    """Without refinements, which say again what their previews said: no plain adapter file would have been sent."""
    return [update for update in updates if not update.refinement]


def reason_class(reason: str) -> str:
    """A few words for a refusal, the same for all updates refused alike: no numbers, ids, hashes or quoted values.

    Reasons quote what clients sent, so nothing but plain words passes from them into a public card.
    """
    reason = reason[:_READ]
    lowered = reason.strip().lower()
    for pattern, name in _REASONS:
        if re.search(pattern, lowered):
            return name
    clause = re.split(r"[;:]|\.\s", re.sub(r"(['\"]).*\1", " ", reason, flags=re.DOTALL), maxsplit=1)[0]
    words = [word for word in re.findall(r"\S+", clause) if re.fullmatch(r"[A-Za-z][a-z'-]*[,.]?", word)]
    return " ".join(words).strip(" ,.'-")[:_MAX_REASON_LENGTH].strip() or _OTHER


def merge_reasons(rows: Iterable[HistoryRow]) -> dict[str, int]:
    """Refusals of all rows by class, the most frequent first."""
    total: Counter[str] = Counter()
    for entry in rows:
        total.update(entry.reasons)
    return dict(sorted(total.items(), key=lambda item: (-item[1], item[0])))


def dump(rows: Iterable[HistoryRow]) -> bytes:
    """JSON lines in the order given, keys sorted, without the fields that hold their default."""
    return "".join(json.dumps(_plain(entry), sort_keys=True, separators=(",", ":")) + "\n" for entry in rows).encode()


def load(data: bytes) -> list[HistoryRow]:
    """Parse what `dump` wrote.

    Raises:
        MailboxError: a line is no row, or rounds do not go up.
    """
    rows: list[HistoryRow] = []
    lines = data.removesuffix(b"\n").split(b"\n") if data else []
    for number, line in enumerate(lines, start=1):
        what = f"Line {number} of the mailbox's history"
        try:
            entry = HistoryRow(**parse_object(line, what, max_bytes=_MAX_LINE))
            _check(entry)
        except (ValueError, TypeError) as error:
            raise MailboxError(f"{what} cannot be read: {printable(error)}") from error
        if rows and entry.round <= rows[-1].round:
            raise MailboxError(
                f"{what} is round {entry.round} after round {rows[-1].round}; expected rounds that go up."
            )
        rows.append(entry)
    return rows


def complete(read: RootReader, head: int, records: Callable[[int], RoundRecord]) -> list[HistoryRow]:
    """The rows of rounds 0 to `head`: those in the file at the root, and what it lacks from the round records."""
    try:
        rows = load(read(HISTORY_FILE) or b"")
    except MailboxUnavailableError:
        raise
    except MailboxError as error:
        logger.warning("%s It is made again from the round records.", printable(error, 500))
        rows = []
    rows = [entry for place, entry in enumerate(rows) if entry.round == place <= head]
    for round in range(len(rows), head + 1):
        rows.append(row(records(round), records(round - 1) if round else None))
    return rows


def _fewest(reasons: Counter[str]) -> dict[str, int]:
    """The most frequent classes in alphabetic order; a round of many odd messages must not make a long row."""
    kept = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    head = Counter(dict(kept[: _MAX_REASONS - 1] if len(kept) > _MAX_REASONS else kept))
    if rest := reasons.total() - head.total():
        head[_OTHER] += rest
    return dict(sorted(head.items()))


def _plain(entry: HistoryRow) -> dict[str, object]:
    values = dataclasses.asdict(entry)
    return {name: value for name, value in values.items() if name not in _DEFAULTS or value != _DEFAULTS[name]}


def _check(entry: HistoryRow) -> None:
    """Raise `ValueError` where a field's value is not of its type."""
    for name, value in dataclasses.asdict(entry).items():
        match name:
            case "opened_at":
                valid = type(value) in (int, float) and math.isfinite(value)
            case "reasons":
                valid = isinstance(value, dict) and len(value) <= _MAX_REASONS
                valid = valid and all(_CLASS.fullmatch(name) and _is_count(count) for name, count in value.items())
            case "restored_from" | "num_examples" | "clipped":
                valid = value is None or _is_count(value)
            case _:
                valid = _is_count(value)
        if not valid:
            raise ValueError(f"{name} is {value!r:.60}")


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0
