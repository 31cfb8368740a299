"""The coordinator: collects a round's messages, aggregates them, publishes the next adapter.

It keeps nothing of its own. Everything is read from the mailbox, so it can be killed anywhere and started anywhere:
for the same set of messages the published adapter is the same, bit for bit.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from fedfstq_hf.codec import CodecContext, Schema, SparseUpdate, get_codec, message
from fedfstq_hf.errors import MailboxError, MessageError, NonFiniteError, RoundConflictError
from fedfstq_hf.federation import adapter_file
from fedfstq_hf.federation.aggregation import WeightedMean, check_server, server_step
from fedfstq_hf.federation.mailbox import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    RECORD_FILE,
    SERVER_STATE_FILE,
    SPEC_FILE,
    UPDATE_FILE,
    Mailbox,
    UpdateRef,
)
from fedfstq_hf.federation.record import AcceptedUpdate, RefusedUpdate, RoundRecord
from fedfstq_hf.federation.spec import FederationSpec

logger = logging.getLogger(__name__)


def found_federation(
    mailbox: Mailbox, spec: FederationSpec, adapter: bytes, adapter_config: bytes, *, now: float | None = None
) -> RoundRecord:
    """Publish round 0: the spec and the initial adapter.

    Args:
        adapter: an `adapter_model.safetensors` file; its schema must be the spec's.
        adapter_config: the PEFT `adapter_config.json`.
        now: seconds since the epoch; the wall clock when None.

    Raises:
        RoundConflictError: the mailbox already holds a federation.
    """
    check_server(spec.server)
    get_codec(spec.codec, **spec.codec_options)
    if mailbox.head() is not None:
        raise RoundConflictError(
            f"{mailbox.address} already holds a federation. Give a new folder, or go on with "
            f"`fedfstq serve {mailbox.address}`."
        )
    record = _record(spec, adapter, 0, time.time() if now is None else now)
    files = {
        SPEC_FILE: spec.to_json(),
        RECORD_FILE: record.to_json(),
        ADAPTER_FILE: adapter,
        ADAPTER_CONFIG_FILE: adapter_config,
    }
    mailbox.publish(0, files)
    mailbox.refresh_root()
    return record


@dataclass
class _Collected:
    mean: WeightedMean
    accepted: list[AcceptedUpdate]
    refused: list[RefusedUpdate]


class Coordinator:
    """Runs the rounds of one mailbox.

    Args:
        mailbox: holds a federation made by `found_federation`.
        clock: seconds since the epoch; a simulation passes its own.
    """

    def __init__(self, mailbox: Mailbox, *, clock: Callable[[], float] = time.time) -> None:
        self.mailbox = mailbox
        self.record: RoundRecord
        self.schema: Schema
        self.adapter: Tensor
        self._clock = clock
        self._refused: dict[UpdateRef, RefusedUpdate] = {}
        head = mailbox.head()
        if head is None:
            raise MailboxError(
                f"{mailbox.address} holds no federation yet. Make one with `fedfstq init {mailbox.address} ...`."
            )
        self.spec = FederationSpec.from_json(mailbox.read(0, SPEC_FILE))
        self._load_head(head)
        mailbox.refresh_root()

    @property
    def finished(self) -> bool:
        """Whether the last round is published."""
        return self.record.finished

    def ready(self) -> bool:
        """Whether enough messages have arrived, or the deadline has passed and there is at least one."""
        return self._enough(sum(ref not in self._refused for ref in self.mailbox.list_updates(self.record.round)))

    def close_round(self) -> RoundRecord | None:
        """Aggregate the messages that lie in the mailbox and publish the next round.

        Returns:
            The new record. None when, after refusals, too few messages are left to close the round: call again later.
            If another coordinator published first, its record is adopted and returned.
        """
        refs = self.mailbox.list_updates(self.record.round)
        collected = self._collect(refs)
        if not self._enough(len(collected.accepted)):
            return None
        previous, now = self.record, self._clock()
        change, server_state = server_step(
            self.adapter, collected.mean.result(), self.spec.server, self._server_state(previous.round)
        )
        adapter = self.adapter + change
        if not bool(adapter.isfinite().all()):
            raise NonFiniteError(
                f"The server optimizer {dict(self.spec.server)} made round {previous.round + 1} infinite or NaN; "
                "nothing was published. Start a federation with a smaller server learning rate."
            )
        adapter_bytes = adapter_file.dump(self.schema.unflatten(adapter))
        packed = self._pack_change(change, collected.mean.total_weight)
        record = _record(
            self.spec,
            adapter_bytes,
            previous.round + 1,
            now,
            accepted=tuple(collected.accepted),
            refused=tuple(collected.refused),
            update_bytes=len(packed) if len(packed) < len(adapter_bytes) else None,
        )
        files = {
            RECORD_FILE: record.to_json(),
            ADAPTER_FILE: adapter_bytes,
            ADAPTER_CONFIG_FILE: self.mailbox.read(0, ADAPTER_CONFIG_FILE),
            SERVER_STATE_FILE: server_state,
        }
        if record.update_bytes is not None:
            files[UPDATE_FILE] = packed
        try:
            self.mailbox.publish(record.round, files)
        except RoundConflictError:
            logger.warning("Another coordinator published round %d first; going on from its result.", record.round)
            self._load_head(record.round)
        else:
            self.record, self.adapter = record, adapter
            self._refused.clear()
        self.mailbox.refresh_root()
        return self.record

    def serve(
        self,
        *,
        poll_seconds: float = 2.0,
        once: bool = False,
        on_round: Callable[[RoundRecord], None] | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> RoundRecord:
        """Close rounds until the federation is finished; returns the last record.

        Args:
            poll_seconds: between two looks at the mailbox.
            once: close only what is ready now.
            on_round: is told each new record.
            sleep: a test or simulation passes its own.
        """
        while not self.finished:
            record = self.close_round() if self.ready() else None
            if record is not None:
                if on_round is not None:
                    on_round(record)
            elif once:
                break
            else:
                sleep(poll_seconds)
        return self.record

    def _load_head(self, head: int) -> None:
        self.record = RoundRecord.from_json(self.mailbox.read(head, RECORD_FILE))
        data = self.mailbox.read(head, ADAPTER_FILE)
        state = adapter_file.load(data, expected_sha256=self.record.adapter_sha256)
        self.schema = Schema.from_state_dict(state)
        self.adapter = self.schema.flatten(state)
        self._refused.clear()

    def _enough(self, count: int) -> bool:
        late = self.record.deadline is not None and self._clock() >= self.record.deadline
        return count >= (1 if late else self.spec.min_clients)

    def _collect(self, refs: Sequence[UpdateRef]) -> _Collected:
        mean, accepted, refused = WeightedMean(self.schema.num_params), [], []
        for ref in refs:
            if ref in self._refused:  # while the round waits for others, it is neither read nor reported again
                refused.append(self._refused[ref])
                continue
            sha256 = ""
            try:
                if ref.num_bytes > self.spec.max_message_bytes:
                    raise MessageError(
                        f"It has {ref.num_bytes} bytes; this federation takes at most {self.spec.max_message_bytes}."
                    )
                data = self.mailbox.read_update(ref)
                sha256 = hashlib.sha256(data).hexdigest()
                header, update = self._open(ref, data)
            except MessageError as error:
                logger.warning("Refused the update of client %s for round %d: %s", ref.client_id, ref.round, error)
                self._refused[ref] = RefusedUpdate(ref.client_id, sha256, ref.num_bytes, str(error))
                refused.append(self._refused[ref])
                continue
            mean.add(update, header.num_examples)
            accepted.append(
                AcceptedUpdate(ref.client_id, sha256, ref.num_bytes, header.num_examples, 0.0, update.norm())
            )
        total = max(mean.total_weight, 1)
        accepted = [
            AcceptedUpdate(u.client_id, u.sha256, u.num_bytes, u.num_examples, u.num_examples / total, u.norm)
            for u in accepted
        ]
        return _Collected(mean, accepted, refused)

    def _open(self, ref: UpdateRef, data: bytes) -> tuple[message.Header, SparseUpdate]:
        header, payload = message.unpack(data, max_bytes=self.spec.max_message_bytes)
        expected = {
            "client": (header.client_id, ref.client_id),
            "round": (header.round, self.record.round),
            "base adapter": (header.base, self.record.adapter_sha256),
            "schema": (header.schema, self.schema.fingerprint),
            "codec": (header.codec, self.spec.codec),
        }
        for what, (given, wanted) in expected.items():
            if given != wanted:
                raise MessageError(f"It names {what} {given}; expected {wanted}.")
        if header.num_examples < 1:
            raise MessageError(f"It says that it was trained on {header.num_examples} examples; expected at least 1.")
        codec = get_codec(self.spec.codec, **self.spec.codec_options)
        update = codec.decode(payload, self.schema, CodecContext(round=self.record.round))
        if not bool(update.values.isfinite().all()):
            raise MessageError("It decodes to values that are not finite.")
        return header, update

    def _server_state(self, round: int) -> bytes | None:
        return self.mailbox.read(round, SERVER_STATE_FILE) if round > 0 else None

    def _pack_change(self, change: Tensor, num_examples: int) -> bytes:
        encoded = get_codec("sparse32").encode(self.schema.unflatten(change))
        header = message.Header(
            round=self.record.round + 1,
            client_id="coordinator",
            num_examples=num_examples,
            base=self.record.adapter_sha256,
            schema=self.schema.fingerprint,
            codec="sparse32",
            params=encoded.params,
        )
        return message.pack(header, encoded.payload)


def _record(
    spec: FederationSpec,
    adapter: bytes,
    round: int,
    now: float,
    *,
    accepted: tuple[AcceptedUpdate, ...] = (),
    refused: tuple[RefusedUpdate, ...] = (),
    update_bytes: int | None = None,
) -> RoundRecord:
    schema = Schema.from_state_dict(adapter_file.load(adapter))
    if schema.fingerprint != spec.schema:
        raise MailboxError("The adapter to publish has other names or shapes than the federation's spec says.")
    finished = round >= spec.rounds
    return RoundRecord(
        round=round,
        adapter_sha256=hashlib.sha256(adapter).hexdigest(),
        adapter_bytes=len(adapter),
        schema=schema.fingerprint,
        opened_at=now,
        deadline=now + spec.round_seconds if spec.round_seconds is not None and not finished else None,
        finished=finished,
        update_bytes=update_bytes,
        accepted=accepted,
        refused=refused,
    )
