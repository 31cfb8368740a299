"""Decoders under attack: mutated and random payloads, valid digest included, end in MessageError or a sane update."""

import contextlib
import random
import struct

import pytest
import torch
import zstandard

from fedfstq_hf.codec import Schema, get_codec, message
from fedfstq_hf.codec.entropy import Writer, uniform
from fedfstq_hf.codec.support import Layout
from fedfstq_hf.errors import MessageError
from tests.codec.conftest import make_update

CODECS = [
    ("fp32", {}),
    ("fp16", {}),
    ("sparse32", {}),
    ("paper", {}),
    ("factored", {}),
    ("fstq", {"levels": 1}),
    ("fstq", {"levels": 4}),
]
DELTA, FISHER = make_update({"q.lora_A": (4, 48), "q.lora_B": (32, 4), "v": (9,)})
SCHEMA = Schema.from_state_dict(DELTA)


def mutate(data, rng):
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        position = rng.randrange(len(data) + 1)
        kind = rng.randrange(5)
        if kind == 0 and position < len(data):
            data[position] ^= 1 << rng.randrange(8)
        elif kind == 1 and position < len(data):
            data[position] = rng.choice([0, 1, 0x7F, 0x80, 0xFF])
        elif kind == 2:
            del data[position : position + rng.randrange(1, 9)]
        elif kind == 3:
            data[position:position] = rng.randbytes(rng.randrange(1, 9))
        else:
            data = data[:position]
    return bytes(data)


def check_sane(update):
    assert update.num_params == SCHEMA.num_params
    assert torch.isfinite(update.values).all()
    if update.indices is None:
        assert update.values.shape == (SCHEMA.num_params,)
    else:
        assert update.values.shape == update.indices.shape
        assert (update.indices.diff() > 0).all()
        assert not update.nnz or 0 <= update.indices[0] <= update.indices[-1] < SCHEMA.num_params


@pytest.mark.parametrize(("name", "options"), CODECS)
def test_mutated_messages(name, options):
    codec, rng = get_codec(name, **options), random.Random(f"{name}{options}")
    source = codec.encode(DELTA, FISHER, max_bytes=None if name in ("fp32", "fp16", "sparse32") else 90).payload
    if name == "sparse32":
        sparse = SCHEMA.unflatten(get_codec("fstq", density=0.2).encode(DELTA, FISHER).reconstruction.to_dense())
        source = codec.encode(sparse).payload
    header = message.Header(1, "mallory", 10, "00" * 32, SCHEMA.fingerprint, name)
    whole = message.pack(header, source)
    refused = 0
    for _ in range(150):
        bad = mutate(whole, rng)
        if bad != whole:
            with pytest.raises(MessageError):
                message.unpack(bad)
        payload = mutate(source, rng)
        _, resealed = message.unpack(message.pack(header, payload))
        try:
            check_sane(codec.decode(resealed, SCHEMA))
        except MessageError:
            refused += 1
    # an entropy-coded payload is almost never well formed by chance
    assert refused > 40


@pytest.mark.parametrize(("name", "options"), CODECS)
def test_random_and_empty_payloads(name, options):
    codec, rng = get_codec(name, **options), random.Random(0)
    for size in [0, 1, 2, 3, 4, 5, 8, 100, 1000]:
        for payload in (bytes(size), b"\xff" * size, rng.randbytes(size)):
            with contextlib.suppress(MessageError):
                check_sane(codec.decode(payload, SCHEMA))


@pytest.mark.parametrize(("name", "options"), CODECS)
def test_a_payload_for_another_adapter(name, options):
    payload = get_codec(name, **options).encode(DELTA, FISHER).payload
    other = Schema.from_state_dict({"a": torch.zeros(16, 16)})
    with pytest.raises(MessageError):
        get_codec(name, **options).decode(payload, other)


def test_fstq_trailing_and_missing_bytes():
    codec = get_codec("fstq")
    payload = codec.encode(DELTA, FISHER).payload
    for bad in (payload + b"\0", payload + b"\1", payload[:-1], b"\1" + payload):
        with pytest.raises(MessageError):
            codec.decode(bad, SCHEMA)


def test_fstq_unknown_kind():
    writer = Writer()
    writer.put([3], uniform(4))
    with pytest.raises(MessageError, match="kind 3"):
        get_codec("fstq").decode(writer.finish(tail=[1] * 64), SCHEMA)


def test_levels_beyond_the_grid_are_refused():
    from fedfstq_hf.codec import support
    from fedfstq_hf.codec.entropy import Adaptive

    layout = Layout.of(Schema.from_state_dict({"a": torch.zeros(1, 1)}))
    writer = Writer()
    writer.put([1], uniform(4))
    index = torch.zeros(1, dtype=torch.int64).numpy()
    support.write(writer, layout, index, support.plan(layout, index))
    writer.put_adaptive([1000], Adaptive(1024))
    writer.put_adaptive([1000], Adaptive(1024))
    writer.put([1, 1], uniform(64))
    with pytest.raises(MessageError, match="level 2000"):
        get_codec("fstq").decode(writer.finish(tail=[0]), Schema.from_state_dict({"a": torch.zeros(1, 1)}))


def test_sparse32_bombs():
    codec = get_codec("sparse32")
    bomb = zstandard.ZstdCompressor(level=19).compress(bytes(50_000_000))
    with pytest.raises(MessageError, match="announce"):
        codec.decode(bytes([5]) + bomb, SCHEMA)
    # a frame that does not announce its size
    stream = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(4 * SCHEMA.num_params))
    with pytest.raises(MessageError, match="announce"):
        codec.decode(bytes([5]) + stream, SCHEMA)
    # the right announcement around too much data
    honest = zstandard.ZstdCompressor().compress(bytes(4 * SCHEMA.num_params))
    with pytest.raises(MessageError, match="end before or after"):
        codec.decode(bytes([5]) + honest + honest, SCHEMA)
    with pytest.raises(MessageError, match="support"):
        codec.decode(b"\0" + struct.pack("<I", 2**32 - 1) + b"abc", SCHEMA)


def test_sparse32_refuses_non_finite_values():
    values = struct.pack("<f", float("nan")) * SCHEMA.num_params
    with pytest.raises(MessageError, match="NaN"):
        get_codec("sparse32").decode(b"\4" + values, SCHEMA)
