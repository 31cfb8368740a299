"""What one client carries from round to round, and the transaction that keeps it whole.

A client is idle or has one message pending: packed and stored, its fate not yet known. Both states are one file,
replaced atomically: `finish` stores the message before anybody may push it, `settle` follows what a round record says
became of it. Killed anywhere, a client therefore neither sends twice nor loses a residual. The session knows no
Trainer; a simulation drives many of them with one.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from filelock import lock_descriptor
from torch import Tensor

from fedfstq_hf.codec import CodecContext, Schema, get_codec, message
from fedfstq_hf.codec.message import PAIR_OVERHEAD, PAIR_PARAMS, join_pair, split_pair
from fedfstq_hf.errors import AdapterMismatchError, BudgetError, MailboxError, NonFiniteError, SessionBusyError
from fedfstq_hf.federation import keys, scaffold, storage
from fedfstq_hf.federation.client.outbox import FORMAT, STATE_FILE, ErrorFeedback, Outbox, Pending, SessionState
from fedfstq_hf.federation.envelope import seal_message
from fedfstq_hf.federation.record import AcceptedUpdate, RoundRecord
from fedfstq_hf.federation.spec import FederationSpec

_MANY_EXAMPLES = 10**9  # as many digits as a header may need


@dataclass(frozen=True)
class Caps:
    """Most bytes of a client's first message of a round, and of its refinement; None for no cap."""

    first: int | None = None
    refinement: int | None = None


@dataclass(frozen=True)
class Settlement:
    """What became of a message, and why.

    `"accepted"`, `"refused"`, `"late"` (no record names it), or `"follows"`: its refinement says it all.
    """

    round: int
    outcome: str
    reason: str = ""


class ClientSession:
    """One client of one federation.

    Args:
        client_id: 1 to 64 letters, digits, '.', '_' or '-'.
        spec: the federation's; names codec, schema and error feedback.
        schema: of the whole adapter; its fingerprint must be the spec's.
        folder: where the state lives, locked against a second process; None keeps it in memory.
        durable: fsync what is stored.
        sign: signs the digest of each message (see `federation.keys.signer`); None sends them unsigned.
        caps: most bytes of any of its messages, whatever its budgets and examples say.

    Attributes:
        last_round: the round whose local training this client finished last; -1 before the first.
        trained: which of its tensors the messages are about.
        schema: of those.
        outbox: the pending message, and the residual of accepted ones, (schema.num_params,) float32.
        settled_round: of the record that made the residual and the control variate; -1 before the first.
        carried: other tensors that travel from round to round (token sensitivity, optimizer moments).
    """

    def __init__(
        self,
        client_id: str,
        spec: FederationSpec,
        schema: Schema,
        *,
        folder: str | os.PathLike[str] | None = None,
        durable: bool = True,
        sign: Callable[[bytes], bytes] | None = None,
        caps: Caps | None = None,
    ) -> None:
        if schema.fingerprint != spec.schema:
            raise AdapterMismatchError(
                f"Client {client_id!r}: this model's adapter has other tensor names or shapes than the federation's "
                f"({schema.num_params} parameters here). Build it from the federation's adapter_config.json."
            )
        self.client_id = client_id
        self.spec = spec
        self.trained = spec.trained_part(schema)
        self.schema = self.trained.schema
        feedback = ErrorFeedback(decay=spec.feedback_decay)
        self._take(SessionState(Outbox(feedback)))
        self._codec = get_codec(spec.method.codec, **spec.method.codec_options)
        self._has_variate = spec.method.scaffold
        self._identity = {
            "format": FORMAT,
            "client_id": client_id,
            "federation": spec.id,
            "schema": self.schema.fingerprint,
        }
        self._sign = sign
        self._caps = caps or Caps()
        self._durable = durable
        self.folder = Path(folder) if folder is not None else None
        self._lock: IO[bytes] | None = None
        if self.folder is not None:
            storage.make_folder(self.folder, durable=durable)
            self._lock = _lock(self.folder)
            storage.remove_leftovers(self.folder)
            try:
                if (self.folder / STATE_FILE).exists():
                    self._take(SessionState.read(self.folder / STATE_FILE, self._identity, feedback))
            except MailboxError:
                self.close()
                raise

    def finish(
        self,
        round: int,
        base: str,
        delta: Tensor,
        *,
        fisher: Tensor | None,
        num_examples: int,
        max_bytes: int | None,
        refinement_bytes: int | None = None,
        carried: dict[str, Tensor] | None = None,
        variate: Tensor | None = None,
    ) -> Pending:
        """Pack and store this round's message. Nothing has been sent yet.

        Args:
            round: the round that Θ_t was published as; larger than `last_round`.
            base: digest of Θ_t (`adapter_file.digest`), hex.
            delta: Θ_local - Θ_t, the whole of it, float32.
            fisher: diagonal adapter Fisher in the same order, or None.
            num_examples: N_k, the client's weight in the mean.
            max_bytes: the whole message's budget in bytes, None for no limit; in a federation whose budgets follow the
                number of examples, that of a client with the mean number.
            refinement_bytes: likewise for the refinement, in a federation that has them; its last round has none, and
                the message itself is as long.
            carried: replaces `carried` once stored.
            variate: this client's next control variate, (num_params,) float32, in a federation that has them.

        Raises:
            NonFiniteError: delta or fisher is NaN or infinite; the session stays as it was.
            BudgetError: the budget cannot hold even an empty message; the session stays as it was.
        """
        if self.pending is not None or round <= self.last_round:
            raise MailboxError(f"Client {self.client_id!r} already finished round {max(round, self.last_round)}.")
        for what, tensor in (("update", delta), ("Fisher information", fisher), ("control variate", variate)):
            if tensor is not None and not bool(tensor.isfinite().all()):
                raise NonFiniteError(
                    f"The {what} of client {self.client_id!r} in round {round} is NaN or infinite; nothing was sent "
                    "and its residual is as before. Lower the learning rate or check the data."
                )
        corrected = self.outbox.corrected(self.trained.take(delta))
        kept = {name: value for name, value in self.carried.items() if name == scaffold.CARRIED}
        if variate is not None:
            variate = variate - scaffold.client_variate(kept, self.schema.num_params)
        weights = None if fisher is None else self.trained.take(fisher)
        first, cap = max_bytes, self._caps.first
        if self.spec.method.refinement_budget is not None and not self.spec.refines(round):
            first, cap = refinement_bytes, self._caps.refinement
        readable = self._pack(round, base, corrected, weights, num_examples, first, variate, cap=cap)
        refinement = None
        if self.spec.refines(round):
            update = (round, base, corrected, weights, num_examples)
            again = self._pack(*update, refinement_bytes, cap=self._caps.refinement, refines=True)
            refinement = self._sealed(again)
        pending = Pending(round, self._sealed(readable), corrected, readable, refinement)
        outbox = self.outbox.with_pending(pending)
        self._store(last_round=round, carried={**(carried or {}), **kept}, outbox=outbox)
        return pending

    def check_budget(self, max_bytes: int) -> None:
        """Raise `BudgetError` unless every message can be kept to `max_bytes` bytes: better now than after training."""
        zeros = torch.zeros(self.schema.num_params)
        refines = self.spec.method.refinement_budget is not None  # with the longer header
        self._pack(self.spec.rounds, "0" * 64, zeros, None, _MANY_EXAMPLES, max_bytes, zeros, refines=refines)

    def settle(self, record: RoundRecord) -> Settlement:
        """Take what became of the pending message into the state.

        Args:
            record: of a later round: the first that decides about the message (`decides`), or the last that could have.
        """
        pending = self.pending
        if pending is None or record.round <= pending.round:
            raise MailboxError(
                f"Client {self.client_id!r} has no message that the record of round {record.round} settles."
            )
        if says_nothing_yet(pending):
            self._store(outbox=self.outbox.settled(None))
            return Settlement(pending.round, "follows")
        fate = record.fate(self.client_id, pending.sha256)
        if not isinstance(fate, AcceptedUpdate):
            self._store(outbox=self.outbox.settled(None))
            if fate is not None:
                return Settlement(pending.round, "refused", fate.reason)
            return Settlement(pending.round, "late", self._why_unused(pending, record))
        _, payload = message.unpack(pending.readable)
        context, carried = CodecContext(round=pending.round), self.carried
        if self._has_variate:
            payload, second = split_pair(payload)
            variate = scaffold.client_variate(carried, self.schema.num_params).clone()
            self._codec.decode(second, self.schema, context).add_to(variate, 1.0)
            carried = {**carried, scaffold.CARRIED: variate}
        sent = self._codec.decode(payload, self.schema, context)
        # all that was sent, also where the server clipped it: what is cut off for its length is not owed
        self._store(outbox=self.outbox.settled(sent), settled_round=record.round, carried=carried)
        return Settlement(pending.round, "accepted")

    def decides(self, record: RoundRecord) -> bool:
        """Whether a later round's record decides about the pending message: no record after it can still use it."""
        return self.pending is not None and (
            record.fate(self.client_id, self.pending.sha256) is not None or self._why_unused(self.pending, record) != ""
        )

    def _why_unused(self, pending: Pending, record: RoundRecord) -> str:
        if record.restored_from is not None:
            return f"round {record.round} went back to round {record.restored_from}"
        if self.client_id in record.named(pending.round):
            return "another message of this client was there"  # of a state that was lost since
        return ""

    @property
    def oldest_round(self) -> int | None:
        """A rollback after this round may undo something that is held here; None where nothing is held."""
        kept = {name for name in self.carried if name != scaffold.CARRIED}
        owes = self.residual is not None or scaffold.CARRIED in self.carried
        made = [round for round, held in ((self.settled_round, owes), (self.last_round, bool(kept))) if held]
        return min(made, default=None)

    def undo(self, record: RoundRecord) -> bool:
        """Drop what was made in rounds that a rollback undid; whether there was anything.

        The residual goes if it holds anything of a message that was accepted after the restored round, though it may
        hold older things too; what is carried goes if its last local training started from the restored round or a
        later one. The control variate always goes: the server's begins anew with zeros as well.

        Args:
            record: of a rollback. A message from before it is settled first.
        """
        restored = record.restored_from
        if restored is None:
            return False
        carried, outbox = dict(self.carried), self.outbox
        if restored < self.settled_round < record.round:
            outbox = dataclasses.replace(outbox, residual=None)
        if self.settled_round < record.round:
            carried.pop(scaffold.CARRIED, None)
        if restored <= self.last_round < record.round:
            carried = {name: value for name, value in carried.items() if name == scaffold.CARRIED}
        if outbox.residual is self.residual and carried.keys() == self.carried.keys():
            return False
        self._store(outbox=outbox, carried=carried)
        return True

    @property
    def pending(self) -> Pending | None:
        """The stored message whose fate is unknown."""
        return self.outbox.pending

    @property
    def residual(self) -> Tensor | None:
        """What is owed of accepted messages; None stands for zeros."""
        return self.outbox.residual

    def residual_norm(self) -> float:
        """L2 norm of the residual."""
        return 0.0 if self.residual is None else float(torch.linalg.vector_norm(self.residual))

    def close(self) -> None:
        """Release the state folder for another process."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def envelope(self, header: message.Header, payload: bytes) -> bytes:
        """What travels of a message of this client: signed with its key, and sealed where the federation is."""
        return self._sealed(message.pack(header, payload, sign=self._sign))

    def _sealed(self, readable: bytes) -> bytes:
        return seal_message(readable, self.spec.sealing_key)

    def _pack(
        self,
        round: int,
        base: str,
        corrected: Tensor,
        fisher: Tensor | None,
        num_examples: int,
        max_bytes: int | None,
        variate: Tensor | None = None,
        *,
        cap: int | None = None,
        refines: bool = False,
    ) -> bytes:
        """A readable message; with a control variate's change its codec gets half of what the budget leaves."""
        if self._has_variate and variate is None:
            raise MailboxError("This federation has control variates (SCAFFOLD), and the client's is missing.")
        header = message.Header(
            round=round,
            client_id=self.client_id,
            num_examples=num_examples,
            base=base,
            schema=self.schema.fingerprint,
            codec=self._codec.name,
            params=PAIR_PARAMS if self._has_variate else message.REFINEMENT_PARAMS if refines else {},
        )
        overhead = 0
        if max_bytes is not None:
            overhead = message.overhead(header, max_bytes, signed=self._sign is not None)
            overhead += keys.SEAL_OVERHEAD if self.spec.sealing_key is not None else 0
            overhead += PAIR_OVERHEAD if self._has_variate else 0
        room = None
        if max_bytes is not None:
            room = (max_bytes - overhead) // (2 if self._has_variate else 1)
            if room > 0:  # a negative one is refused with what is missing
                room = math.floor(room * self.spec.budget_share(num_examples))
                if cap is not None:
                    room = max(0, min(room, (cap - overhead) // (2 if self._has_variate else 1)))

        def encode(vector: Tensor, weights: Tensor | None) -> bytes:
            return self._codec.encode(
                self.schema.unflatten(vector),
                None if weights is None else self.schema.unflatten(weights),
                max_bytes=room,
                context=CodecContext(round=round),
            ).payload

        try:
            payload = encode(corrected, fisher)
            if self._has_variate and variate is not None:
                payload = join_pair(payload, encode(variate, None))
        except BudgetError as error:
            raise BudgetError(
                f"An uplink budget of {max_bytes} bytes, {overhead} of them for the message's header, is too small for "
                f"client {self.client_id!r}: {error}"
            ) from error
        return message.pack(header, payload, sign=self._sign)

    def _store(self, **changes: Any) -> None:
        """Make the changes (attribute -> value), on disk first."""
        now = SessionState(self.outbox, self.last_round, self.settled_round, self.carried)
        state = dataclasses.replace(now, **changes)
        if self.folder is not None:
            storage.replace_file(self.folder / STATE_FILE, state.to_bytes(self._identity), durable=self._durable)
        self._take(state)

    def _take(self, state: SessionState) -> None:
        self.outbox, self.carried = state.outbox, dict(state.carried)
        self.last_round, self.settled_round = state.last_round, state.settled_round


def says_nothing_yet(pending: Pending) -> bool:
    """Whether a message is an empty preview, which is not sent: all of it follows in its refinement."""
    return pending.refinement is not None and not message.unpack(pending.readable)[1]


def _lock(folder: Path) -> IO[bytes]:
    file = storage.open_lock(folder / "session.lock")
    try:
        free = lock_descriptor(file.fileno(), blocking=False)  # until the file is closed, or the process ends
    except OSError as error:
        file.close()
        raise MailboxError(
            f"The client state in {folder} cannot be locked: {error.strerror or error}. Put it on a local disk "
            "(state_dir)."
        ) from error
    if not free:
        file.close()
        raise SessionBusyError(
            f"Another process uses the client state in {folder}. Stop it first, or give this client another state_dir."
        )
    return file
