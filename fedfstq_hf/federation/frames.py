"""Frames of the downlink, as in video coding: how a client comes from an adapter that it holds to the published one.

A round publishes, beside the plain adapter file, at most one frame, a message (`codec.message`) whose parameters say
what it is:

- `messages`: the payloads that the round accepted, with their weights. Who holds Θ_t decodes them, takes their mean and
  the server's step, and has Θ_{t+1}, bit for bit: the server's step is the same on every processor (`aggregation`).
- `step`: a coded change; Θ_{t+1} is Θ_t plus what it decodes to. For federations whose messages nobody else may see.
- `keyframe`: a coded adapter; Θ_{t+1} is Θ_0 plus what it decodes to. It needs nothing of the rounds in between.

The last two are lossy, and what is published *is* what they decode to; what they leave out the server keeps and adds
to what it codes next (`server.publication`). So all paths to Θ_t end in the same bits, and the record's digest of the
adapter proves it: a frame that is damaged, missing or forged only costs the download of the plain file.

Θ_0 is a function of the schema and a seed where the adapter is a LoRA as PEFT begins it (`drawn`): then nobody
downloads it.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedfstq_hf.codec import CodecContext, Schema, get_codec, message
from fedfstq_hf.codec.schema import TensorSpec, is_lora_a, is_lora_b
from fedfstq_hf.errors import MessageError
from fedfstq_hf.federation import adapter_file
from fedfstq_hf.federation.aggregation import WeightedMean, server_step
from fedfstq_hf.federation.mailbox.protocol import ADAPTER_FILE, Mailbox
from fedfstq_hf.federation.record import MESSAGES, Frame, RoundRecord
from fedfstq_hf.federation.spec import FederationSpec

CODEC = "uniform"
"""Of steps and keyframes."""
_PARAMETER = "frame"
_SENDER = "coordinator"
_ENTRY = struct.Struct("<QddI")  # round, weight, scale, bytes of the payload


class Share(NamedTuple):
    """One accepted message as a frame of kind `messages` has it.

    `round` is the one it was sent for; `weight` any scale, `scale` what clipping multiplied it with.
    """

    round: int
    weight: float
    scale: float
    payload: bytes


def pack_messages(shares: Sequence[Share], *, round: int, base: str, schema: Schema) -> bytes:
    """The frame of a round's messages, from the adapter with digest `base`; in the order in which they were added."""
    head = struct.pack("<I", len(shares))
    entries = b"".join(_ENTRY.pack(share.round, share.weight, share.scale, len(share.payload)) for share in shares)
    return _pack(MESSAGES, head + entries + b"".join(share.payload for share in shares), round, base, schema)


def pack_coded(kind: str, payload: bytes, *, round: int, base: str, schema: Schema) -> bytes:
    """The frame of a coded step (base: digest of Θ_{round-1}) or keyframe (base: that of Θ_0)."""
    return _pack(kind, payload, round, base, schema)


def _pack(kind: str, payload: bytes, round: int, base: str, schema: Schema) -> bytes:
    codec = MESSAGES if kind == MESSAGES else CODEC
    return message.pack(message.Header(round, _SENDER, 0, base, schema.fingerprint, codec, {_PARAMETER: kind}), payload)


def apply(data: bytes, frame: Frame, adapter: Tensor, spec: FederationSpec, schema: Schema) -> Tensor:
    """The adapter after a frame, (num_params,) float32.

    Args:
        data: the frame.
        frame: what it is to be.
        adapter: what it starts from, (num_params,) float32.
        spec: of the federation.
        schema: of the whole adapter.

    Raises:
        MessageError: the frame is damaged, another one, or starts from another adapter.
    """
    header, payload = message.unpack(data, max_bytes=frame.num_bytes)
    expected = message.Header(
        frame.round,
        _SENDER,
        0,
        schema.digest(adapter),
        schema.fingerprint,
        MESSAGES if frame.kind == MESSAGES else CODEC,
        {_PARAMETER: frame.kind},
    )
    if header != expected:
        raise MessageError(
            f"The frame of round {frame.round} is not the {frame.kind} that its record names, from the adapter at hand."
        )
    if frame.kind == MESSAGES:
        part = spec.trained_part(schema)
        mean = _mean(payload, spec, part.schema)
        progress = min(1.0, (frame.round - 1) / max(1, spec.rounds - 1))
        change, _ = server_step(part.take(adapter), mean, spec.method.server.to_yaml(), None, progress)
        return adapter + part.put(change)
    part = spec.trained_part(schema)
    update = get_codec(CODEC).decode(payload, part.schema)
    return adapter + part.put(update.to_dense())


def _mean(payload: bytes, spec: FederationSpec, schema: Schema) -> Tensor:
    """The weighted mean of the messages in a frame, (num_params,) float32. Raises MessageError if it is malformed."""
    codec = get_codec(spec.method.codec, **spec.method.codec_options)
    mean = WeightedMean(schema.num_params)
    start = 4
    count = int.from_bytes(payload[:start], "little")
    position = start + count * _ENTRY.size
    if len(payload) < position or not count:
        raise MessageError(f"A frame of {len(payload)} bytes announces {count} messages.")
    for round, weight, scale, size in _ENTRY.iter_unpack(payload[start:position]):
        if not (0 <= weight < math.inf and 0 <= scale <= 1) or position + size > len(payload):
            raise MessageError("A frame's message has a weight out of range, or does not end within.")
        update = codec.decode(payload[position : position + size], schema, CodecContext(round=round))
        mean.add(update, weight, scale)
        position += size
    if position != len(payload) or not 0 < mean.total_weight < math.inf:
        raise MessageError(f"A frame of {len(payload)} bytes ends at byte {position}, or its messages weigh nothing.")
    return mean.result()


def initial_adapter(mailbox: Mailbox, record: RoundRecord, spec: FederationSpec, schema: Schema) -> tuple[Tensor, int]:
    """Θ_0, (num_params,) float32, and the bytes that were downloaded for it: none where it is `drawn`.

    Args:
        record: of round 0.

    Raises:
        MailboxError: the file is not the one that the record names.
    """
    vector = drawn(schema, spec.seed)
    if vector is not None and schema.digest(vector) == record.adapter_digest:
        return vector, 0
    data = mailbox.read(0, ADAPTER_FILE, max_bytes=adapter_file.most_bytes(schema))
    return schema.flatten(adapter_file.load(data, expected_sha256=record.adapter_sha256, schema=schema)), len(data)


def drawn(schema: Schema, seed: int) -> Tensor | None:
    """Θ_0 of a LoRA as PEFT begins it, (num_params,) float32: A uniform within 1 / sqrt(fan-in), B zero.

    The same bits everywhere: numpy's PCG64, seeded with `seed` and the tensor's name, and one rounded product each.
    None where the adapter has other tensors, which no seed gives.
    """
    vector = torch.zeros(schema.num_params)
    for spec in schema.tensors:
        if is_lora_a(spec.name) and len(spec.shape) >= 2 and spec.dtype == "float32":
            vector[spec.offset : spec.offset + spec.size] = torch.from_numpy(_uniform(spec, seed))
        elif not is_lora_b(spec.name) or spec.dtype != "float32":
            return None
    return vector


def _uniform(spec: TensorSpec, seed: int) -> np.ndarray:
    digest = hashlib.sha256(f"fedfstq initial\n{seed}\n{spec.name}".encode()).digest()
    numbers = np.random.Generator(np.random.PCG64(int.from_bytes(digest, "big"))).random(spec.size, dtype=np.float32)
    bound = np.float32(1 / math.sqrt(math.prod(spec.shape[1:])))
    return (2 * numbers - 1) * bound
