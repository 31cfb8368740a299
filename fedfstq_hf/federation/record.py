"""The record of a round: which updates made the published adapter, and which were refused and why."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fedfstq_hf import __version__
from fedfstq_hf.errors import MailboxError
from fedfstq_hf.federation.storage import checked_name
from fedfstq_hf.text import parse_object, printable

FORMAT = 4
FIGURES = ("num_examples", "weight", "norm", "scale")
"""Of an `AcceptedUpdate`; public records of sealed federations leave them out."""
MAX_BYTES = 16 * 10**6
MAX_REASON = 300
"""Characters of a reason for which an update was not used."""


@dataclass(frozen=True)
class AcceptedUpdate:
    """One client's share of a round.

    `FIGURES` are 0 (scale: 1) in the record of a sealed federation that was read without the coordinator's key.

    Attributes:
        sha256: of the message as it lay in the mailbox; names it in the record.
        num_examples: as the message says, before any cap.
        weight: share of the mean; the weights of a round sum to 1.
        norm: L2 norm of the decoded update before clipping.
        scale: what clipping multiplied the update with; 1 when it was not clipped.
        staleness: rounds between the one it was trained in and the one that used it; 0 when in time.
        signed: its signature was verified.
    """

    client_id: str
    sha256: str
    num_bytes: int
    num_examples: int = 0
    weight: float = 0.0
    norm: float = 0.0
    scale: float = 1.0
    staleness: int = 0
    signed: bool = False


@dataclass(frozen=True)
class RefusedUpdate:
    """An update that was not used, with the reason in words. `sha256` is empty where it was too large to be read.

    `round` is the one it was sent for, given where it is not the round that this record closed. `refinement`: it was
    the client's second message of that round.
    """

    client_id: str
    sha256: str
    num_bytes: int
    reason: str
    round: int | None = None
    refinement: bool = False


MESSAGES, STEP, KEYFRAME = "messages", "step", "keyframe"
KINDS = (MESSAGES, STEP, KEYFRAME)
"""Of frames: see `federation.frames`."""


class Frame(NamedTuple):
    """A frame of the downlink: the round that it leads to, its kind, and its bytes."""

    round: int
    kind: str
    num_bytes: int


@dataclass(frozen=True)
class Path:
    """A way to a round: frames to apply in order, the first on the adapter that is held, or on Θ_0 if a keyframe.

    None stands for the plain adapter file. `num_bytes` is the download.
    """

    frames: tuple[Frame, ...] | None
    num_bytes: int


def listed(frames: Sequence[Frame], new: Frame | None, whole: int) -> tuple[Frame, ...]:
    """The frames that the next record names: those since a keyframe, or as many as weigh less than the plain file."""
    if new is None:
        return ()
    if new.kind == KEYFRAME:
        return (new,)
    kept = [*frames, new]
    while len(kept) > 1 and sum(frame.num_bytes for frame in kept) >= whole:
        kept.pop(0)
    return tuple(kept)


@dataclass(frozen=True)
class RoundRecord:
    """What was published as round `round`: the adapter Θ_round and the updates it was made from.

    Attributes:
        round: 0 for the initial adapter; `r` for the adapter after `r` aggregations.
        adapter_sha256: of the published `adapter_model.safetensors`.
        adapter_digest: of the adapter's vector (`adapter_file.digest`); the base that messages of this round name.
        adapter_bytes: its size in bytes.
        frames: of the downlink, the newest last: those that a client may need on its way to this round.
        opened_at, deadline: seconds since the epoch by the coordinator's clock; no deadline when None.
        finished: True on the last round: no more updates are wanted.
        late: updates of earlier rounds that arrived after those were closed; each is counted once.
        refinements: second messages that took the place of first ones in the mean of the round before the one that
            this record closed; `weight` is their share of it.
        selected: the clients whose updates of this round are wanted; None for all.
        restored_from: the earlier round whose adapter this round published again, after a rollback.
        variate_sha256, variate_bytes: of the published control variate (SCAFFOLD); None and 0 without one.
        residual_sha256: of what the published adapter lacks of the exact one, which the server keeps; None for nothing.
        attached_bytes: what clients sent beside their updates (token sensitivities), used or not; in the last round.
        unpublished: why nothing was published of it; empty where something was, or nothing was sent.
        sealed: in a sealed federation a box with the `FIGURES` of its updates (`federation.signed_records`), base64.
        signature: of the founder (`federation.signed_records`), 128 hex digits; empty without one.
        package_version: of the coordinator.
    """

    round: int
    adapter_sha256: str
    adapter_digest: str
    adapter_bytes: int
    schema: str
    opened_at: float
    deadline: float | None
    finished: bool
    frames: tuple[Frame, ...] = ()
    accepted: tuple[AcceptedUpdate, ...] = ()
    refused: tuple[RefusedUpdate, ...] = ()
    late: tuple[RefusedUpdate, ...] = ()
    refinements: tuple[AcceptedUpdate, ...] = ()
    selected: tuple[str, ...] | None = None
    restored_from: int | None = None
    attached_bytes: int = 0
    unpublished: str = ""
    variate_sha256: str | None = None
    variate_bytes: int = 0
    residual_sha256: str | None = None
    sealed: str | None = None
    signature: str = ""
    package_version: str = __version__
    format: int = field(default=FORMAT)

    @property
    def updates(self) -> tuple[AcceptedUpdate | RefusedUpdate, ...]:
        """All messages that this record names: accepted, refinements, refused, late."""
        return (*self.accepted, *self.refinements, *self.refused, *self.late)

    @property
    def uplink_bytes(self) -> int:
        """Bytes that arrived from all clients together since the previous record, refused and late ones included."""
        return self.attached_bytes + sum(update.num_bytes for update in self.updates)

    @property
    def hides_figures(self) -> bool:
        """Whether it has updates whose `FIGURES` are sealed, and was read without the key."""
        used = (*self.accepted, *self.refinements)
        return self.sealed is not None and bool(used) and not any(update.weight for update in used)

    def path_from(self, held: int | None, initial_bytes: int = 0) -> Path:
        """The cheapest way to this round, in bytes, for who holds the adapter of round `held`, if any.

        initial_bytes: what Θ_0 costs who needs it.
        """
        if held == self.round:
            return Path((), 0)
        best, total = Path(None, self.adapter_bytes), 0
        for index in range(len(self.frames) - 1, -1, -1):
            frame = self.frames[index]
            total += frame.num_bytes
            from_held = frame.kind != KEYFRAME and frame.round - 1 == held
            if from_held or frame.kind == KEYFRAME or frame.round == 1:
                cost = total if from_held else total + initial_bytes
                best = Path(self.frames[index:], cost) if cost < best.num_bytes else best
        return best

    def fate(self, client_id: str, sha256: str) -> AcceptedUpdate | RefusedUpdate | None:
        """What became of a client's message; None when the record does not name it (late or lost)."""
        for accepted in self.accepted:
            if (accepted.client_id, accepted.sha256) == (client_id, sha256):
                return accepted
        for unused in (*self.refused, *self.late):
            if unused.client_id == client_id and unused.sha256 in (sha256, "") and not unused.refinement:
                return unused
        return None

    def named(self, round: int, *, refinements: bool = False) -> set[str]:
        """The clients whose update of `round`, or its refinement, this record names, accepted or not."""
        if refinements:
            in_time = {u.client_id for u in self.refinements if self.round - 2 == round}
        else:
            in_time = {u.client_id for u in self.accepted if self.round - 1 - u.staleness == round}
        others = {
            u.client_id
            for u in (*self.refused, *self.late)
            if u.refinement == refinements and (u.round if u.round is not None else self.round - 1) == round
        }
        return in_time | others

    def to_json(self) -> bytes:
        """JSON with sorted keys, without what has its default, as all clients download it.

        `FIGURES` are left out where `sealed` holds them.
        """
        fields = _told(self) | {name: [_told(entry) for entry in getattr(self, name)] for name in _UPDATES}
        if self.sealed is not None:
            for update in (*fields["accepted"], *fields["refinements"]):
                for name in FIGURES:
                    update.pop(name, None)
        told = {name: value for name, value in fields.items() if value or name not in _UPDATES}
        return (json.dumps(told, separators=(",", ":"), sort_keys=True) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes) -> RoundRecord:
        """Parse `round.json`.

        Raises:
            MailboxError: not a round record of this format.
        """
        try:
            fields = parse_object(data, "The mailbox's round record", max_bytes=MAX_BYTES)
            if fields.get("format") != FORMAT:
                raise other_version("round record", fields, FORMAT)
            for name, kind in _UPDATES.items():
                fields[name] = tuple(kind(**_checked(kind, entry)) for entry in fields.get(name, []))
            fields["frames"] = tuple(_frame(entry) for entry in fields.get("frames", []))
            if fields.get("selected") is not None:
                fields["selected"] = tuple(checked_name(str(client)) for client in fields["selected"])
            return cls(**_checked(cls, fields))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise MailboxError(f"The mailbox's round record cannot be read: {printable(error)}") from error


_UPDATES = {
    "accepted": AcceptedUpdate,
    "refused": RefusedUpdate,
    "late": RefusedUpdate,
    "refinements": AcceptedUpdate,
}


def _told(entry: Any) -> dict[str, Any]:
    """The fields of a record or an update that have not their default, and the format."""
    fields = ((item, getattr(entry, item.name)) for item in dataclasses.fields(entry))
    return {item.name: value for item, value in fields if item.name == "format" or value != item.default}


def _frame(entry: Any) -> Frame:
    frame = Frame(*entry)
    whole = all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in (frame.round, frame.num_bytes))
    if not whole or frame.kind not in KINDS:
        raise ValueError(f"frames has {entry!r:.60}, expected [round, kind, bytes]")
    return frame


_TYPES: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "str": (str,), "bool": (bool,)}
_SHA256 = re.compile(r"[0-9a-f]{0,64}")


def _checked(kind: type, fields: Any) -> dict[str, Any]:
    """The fields of a record or an update, each of the type that its class gives it; numbers are not negative.

    Raises:
        ValueError, TypeError, MailboxError: they are not.
    """
    if not isinstance(fields, dict):
        raise TypeError(f"an update is a {type(fields).__name__}, expected an object")
    for field_ in dataclasses.fields(kind):
        value, (name, *optional) = fields.get(field_.name, field_.default), str(field_.type).split(" | ")
        if name not in _TYPES or (value is None and optional) or value is dataclasses.MISSING:
            continue  # a missing one is named by the class
        right = isinstance(value, _TYPES[name]) and isinstance(value, bool) == (name == "bool")
        if not right or (name in ("int", "float") and value < 0):
            raise ValueError(f"{field_.name} is {value!r:.60}, expected {field_.type}")
        if field_.name == "client_id":
            checked_name(value)
        if field_.name.endswith(("sha256", "digest")) and not _SHA256.fullmatch(value):
            raise ValueError(f"{field_.name} is {value!r:.60}, expected hex digits")
        if field_.name == "reason":
            fields["reason"] = value[:MAX_REASON]
    return fields


def other_version(what: str, fields: dict[str, Any], expected: int) -> MailboxError:
    """The error for a mailbox file of another format; it names the version to install where the file tells."""
    version = fields.get("package_version")
    remedy = (
        f"Type: pip install fedfstq_hf=={version}"
        # no more than a version: whoever types what stands there installs it
        if isinstance(version, str) and re.fullmatch(r"[0-9][0-9A-Za-z.+]{0,30}", version) and version != __version__
        else "Install the fedfstq_hf version that the federation's coordinator runs."
    )
    return MailboxError(
        f"The mailbox's {what} has format {printable(repr(fields.get('format')), 40)}; fedfstq_hf {__version__} reads "
        f"format {expected}. {remedy}"
    )


def expected_messages(record: RoundRecord, first: int) -> int:
    """How many messages the round that `record` opens will have: as many as the last one took in.

    Args:
        first: how many to expect before there was a round, or after a rollback. Rather too few than too many: noise
            of the first rounds is not made good later.
    """
    return len(record.accepted) or first
