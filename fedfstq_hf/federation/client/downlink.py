"""What a client downloads to hold Θ_t: the packed changes since the adapter it holds, or the whole adapter."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fedfstq_hf.codec import CodecContext, Schema, get_codec, message
from fedfstq_hf.errors import MailboxError
from fedfstq_hf.federation import adapter_file
from fedfstq_hf.federation.record import RoundRecord


@dataclass(frozen=True)
class Download:
    """`changes` are the rounds whose packed change is applied in order; None stands for the whole adapter file.

    `num_bytes` counts the control variate, where the round has one, too.
    """

    changes: tuple[int, ...] | None
    num_bytes: int


def cheapest_download(held: int | None, wanted: int, record: Callable[[int], RoundRecord]) -> Download:
    """The cheaper of the two ways from round `held` (None: nothing) to round `wanted`, in bytes."""
    whole, variate = record(wanted).adapter_bytes, record(wanted).variate_bytes
    if held is not None and held <= wanted:
        rounds, total = tuple(range(held + 1, wanted + 1)), 0
        for round in rounds:
            size = record(round).update_bytes
            total += whole if size is None else size
            if total >= whole:
                return Download(None, whole + variate)
        return Download(rounds, total + variate)
    return Download(None, whole + variate)


def apply_change(data: bytes, base: RoundRecord, adapter: Tensor, record: RoundRecord, schema: Schema) -> Tensor:
    """Θ_{t+1} from Θ_t and the packed global change; exact, which the record's sha256 proves.

    Raises:
        MailboxError: the change is damaged, or does not lead from `base` to `record`.
    """
    header, payload = message.unpack(data)
    if header.base != base.adapter_sha256:
        raise MailboxError(f"The packed change of round {record.round} starts from another adapter.")
    update = get_codec(header.codec).decode(payload, schema, CodecContext(round=record.round))
    changed = adapter + update.to_dense()
    if hashlib.sha256(adapter_file.dump(schema.unflatten(changed))).hexdigest() != record.adapter_sha256:
        raise MailboxError(
            f"The packed change of round {record.round} does not give the adapter that its record names."
        )
    return changed
