"""Screening: opening a message and refusing it, in words, unless it is what the open round asks for."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial

from fedfstq_hf.codec import CodecContext, Schema, SparseUpdate, get_codec, message
from fedfstq_hf.codec.message import PAIR_PARAMS, split_pair
from fedfstq_hf.errors import MessageError
from fedfstq_hf.federation import keys
from fedfstq_hf.federation.control import Control
from fedfstq_hf.federation.envelope import Expected, Opened, open_message
from fedfstq_hf.federation.keys import Unseal
from fedfstq_hf.federation.mailbox.protocol import UpdateRef
from fedfstq_hf.federation.spec import FederationSpec


@dataclass(frozen=True)
class OpenedUpdate:
    """A message that passed: its header, what it decodes to and its L2 norm, and whether its signature was verified.

    `variate` is the change of the client's control variate, where the federation has them; `payload` what the update
    was decoded from.
    """

    header: message.Header
    update: SparseUpdate
    norm: float
    signed: bool
    variate: SparseUpdate | None = None
    payload: bytes = b""


class Screening:
    """Opens the messages of one federation.

    Args:
        spec: what the federation shares.
        schema: of what travels of its adapter.
        control: who is enrolled, with which keys.
        unseal: opens sealed messages with the coordinator's private key; None where it has none.
    """

    def __init__(self, spec: FederationSpec, schema: Schema, control: Control, unseal: Unseal | None = None) -> None:
        self.spec = spec
        self.control = control
        self._schema = schema
        self._unseal = unseal
        self._codec = get_codec(spec.method.codec, **spec.method.codec_options)

    @property
    def max_bytes(self) -> int:
        """The largest message that is read at all, in bytes."""
        return self.spec.max_message_bytes + (keys.SEAL_OVERHEAD if self.spec.sealing_key else 0)

    def check_sender(self, ref: UpdateRef, selected: Collection[str] | None) -> None:
        """Refuse an update before it is read: who sent it, and how large it is.

        Raises:
            MessageError: it is not wanted.
        """
        if not self.control.enrolled(ref.client_id):
            raise MessageError(f"Client {ref.client_id} is not enrolled in this federation.")
        if selected is not None and ref.client_id not in selected:
            raise MessageError(f"Client {ref.client_id} was not selected for this round.")
        if ref.num_bytes > self.max_bytes:
            raise MessageError(f"It has {ref.num_bytes} bytes; this federation takes at most {self.max_bytes}.")

    def open(self, ref: UpdateRef, data: bytes, base: str) -> OpenedUpdate:
        """Decode a message.

        Args:
            ref: where it lay: the client it must come from, the round it must be for, and the size it was listed with.
            base: digest of the adapter that it must be based on.

        Raises:
            MessageError: it is malformed, or not what `ref` and the federation say.
        """
        if len(data) != ref.num_bytes:  # a weight may follow from it
            raise MessageError(f"It has {len(data)} bytes; the mailbox listed it with {ref.num_bytes}.")
        expected = Expected(ref.client_id, ref.round, base, self._schema.fingerprint, self.spec.method.codec)
        opened = self._open(data, expected, self.spec.max_message_bytes)
        header, payload = opened.header, opened.payload
        if header.num_examples < 1:
            raise MessageError(f"It says that it was trained on {header.num_examples} examples; expected at least 1.")
        if (header.params == message.REFINEMENT_PARAMS) != ref.refinement:
            wrong, right = ("first message", "refinement") if ref.refinement else ("refinement", "first message")
            raise MessageError(f"It is a {wrong}, and lies where the round's {right} was expected.")
        pair = self.spec.method.scaffold
        if not pair and header.params not in ({}, message.REFINEMENT_PARAMS):
            raise MessageError(
                f"It has parameters {header.params!r:.80}; this federation's messages have none of these."
            )
        context = CodecContext(round=ref.round)
        variate: SparseUpdate | None = None
        if pair:
            if header.params != PAIR_PARAMS:
                raise MessageError("It carries no control variate; this federation's messages have two payloads.")
            payload, second = split_pair(payload)
            variate = self._codec.decode(second, self._schema, context)
        update = self._codec.decode(payload, self._schema, context)
        norm = update.norm()
        if not math.isfinite(norm) or (variate is not None and not math.isfinite(variate.norm())):
            raise MessageError("It decodes to values that are not finite.")
        return OpenedUpdate(header, update, norm, opened.signed, variate, payload)

    def open_attachment(
        self, client_id: str, name: str, data: bytes, *, round: int, base: str, max_bytes: int
    ) -> bytes:
        """The file that a client attached to its message of a round, signed and sealed as its messages must be.

        Args:
            client_id: where it lay.
            name: of the file.
            round: that it must be attached to.
            base: digest of the adapter that it must be based on, hex.
            max_bytes: of the file.

        Raises:
            MessageError: it is malformed, or another attachment than that.
        """
        expected = Expected(client_id, round, base, self._schema.fingerprint, message.ATTACHMENT)
        opened = self._open(data, expected, max_bytes + message.MAX_CONTAINER)
        if opened.header != message.attachment_header(
            name, client_id=client_id, round=round, base=base, schema=self._schema.fingerprint
        ):
            raise MessageError(f"It is not the attachment {name}, or says more than its name.")
        if len(opened.payload) > max_bytes:
            raise MessageError(f"It has {len(opened.payload)} bytes; at most {max_bytes} are taken.")
        return opened.payload

    def _open(self, data: bytes, expected: Expected, max_bytes: int) -> Opened:
        return open_message(
            data,
            expected,
            max_bytes=max_bytes,
            sealed=self.spec.sealing_key is not None,
            unseal=self._unseal,
            verify=partial(self._verified, expected.client_id),
        )

    def _verified(self, client_id: str, digest: bytes, signature: bytes | None) -> bool:
        key = self.control.enrolment(client_id).verify_key
        if key is None:
            if self.spec.signatures:
                raise MessageError(f"No verify key is enrolled for client {client_id}: its signature proves nothing.")
            return False
        if signature is None:
            raise MessageError(f"It is not signed; client {client_id} is enrolled with a verify key.")
        keys.verify(key, self.spec.id, digest, signature)
        return True
