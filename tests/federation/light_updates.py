"""Hand-made messages for the light federation: any field wrong on purpose, signed or sealed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from light import SCHEMA, found_in
from torch import Tensor

from fedfstq_hf.codec import get_codec, message
from fedfstq_hf.federation.control import Control, Enrolment
from fedfstq_hf.federation.mailbox.folder import FolderMailbox
from fedfstq_hf.federation.mailbox.protocol import Mailbox
from fedfstq_hf.federation.record import RoundRecord

SIZE = SCHEMA.num_params


def delta(number: float) -> Tensor:
    return torch.linspace(-number, 2 * number, SIZE)


def ones(norm: float) -> Tensor:
    """All coordinates equal, of this L2 norm."""
    return torch.full((SIZE,), norm / SIZE**0.5)


def make_message(
    mailbox: Mailbox,
    client_id: str,
    update: Tensor,
    *,
    num_examples: int = 1,
    round: int = 0,
    sign: Callable[[bytes], bytes] | None = None,
    encoded_by: str = "fp32",
    max_bytes: int | None = None,
    **changes: object,
) -> bytes:
    """A message for `round`, based on its adapter; `changes` are fields of the header."""
    record = RoundRecord.from_json(mailbox.read(round, "round.json"))
    settings = {"base": record.adapter_digest, "schema": SCHEMA.fingerprint, "codec": encoded_by} | changes
    header = message.Header(round=round, client_id=client_id, num_examples=num_examples, **settings)
    return message.pack(
        header, get_codec(encoded_by).encode(SCHEMA.unflatten(update), max_bytes=max_bytes).payload, sign=sign
    )


def post(
    mailbox: Mailbox, client_id: str, update: Tensor, *, round: int = 0, path_id: str | None = None, **changes: object
) -> bytes:
    """Post `make_message` under `path_id`; returns it."""
    data = make_message(mailbox, client_id, update, round=round, **changes)
    mailbox.post_update(round, path_id or client_id, data)
    return data


def found_enrolled(path: Path, clients: str | Mapping[str, Enrolment], **changes: object) -> FolderMailbox:
    """A federation in which only these clients (one letter each, or with their enrolments) may take part."""
    if isinstance(clients, str):
        clients = {name: Enrolment() for name in clients}
    mailbox = FolderMailbox(path, durable=False)
    found_in(mailbox, control=Control(clients=clients), **changes)
    return mailbox
