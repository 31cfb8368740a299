"""sparseloco: quantiser and bytes worked out by hand, and what the entropy coder saves on the same symbols."""

import struct

import numpy as np
import pytest
import torch

from fedfstq_hf.codec import Schema, get_codec
from fedfstq_hf.codec.baselines.sparseloco import Chunks, quantize
from fedfstq_hf.errors import MessageError

DELTA = {"a": torch.tensor([0.5, -3.0, 0.1, 1.0, 3.0, 0.2, -1.0, *[0.0] * 9])}
SCHEMA = Schema.from_state_dict(DELTA)
LEVELS = struct.pack("<ffff", 0, -3, 0, 3)
PLACES = bytes([1, 0x30, 0, 4, 0x60, 0])  # 1, 3, 4, 6 in 12 bits each


def test_quantiser():
    # mean 0, sigma sqrt(20/3) = 2.58, step 6 * 2.58 / 4 = 3.87: 1.23, 1.74, 2.26, 2.77
    numbers, levels = quantize(np.array([-3, -1, 1, 3], dtype=np.float32))
    assert numbers.tolist() == [1, 2, 2, 3]
    assert levels.tolist() == [0.0, -3.0, 0.0, 3.0]


def test_quantiser_of_equal_values_and_of_one():
    for values in ([2.0, 2.0, 2.0], [2.0]):
        numbers, levels = quantize(np.array(values, dtype=np.float32))
        assert numbers.tolist() == [2] * len(values)
        assert levels.tolist() == [0.0, 0.0, 2.0, 0.0]


@pytest.mark.parametrize(
    ("packed", "form", "values"), [(False, 0, bytes([1, 2, 3, 2])), (True, 1, bytes([0b10_11_10_01]))]
)
def test_payload_byte_by_byte(packed, form, values):
    # k = 1024 per 4096 is a quarter: 4 of these 16
    encoded = get_codec("sparseloco", top_k=1024, packed=packed).encode(DELTA)
    assert encoded.payload == bytes([form]) + struct.pack("<H", 1024) + LEVELS + PLACES + values
    assert encoded.reconstruction.indices.tolist() == [1, 3, 4, 6]
    assert encoded.reconstruction.values.tolist() == [-3.0, 0.0, 3.0, 0.0]


def test_chunks_do_not_cross_tensors():
    schema = Schema.from_state_dict({"a": torch.zeros(5000), "b": torch.zeros(0), "c": torch.zeros(10)})
    chunks = Chunks.of(schema, 64)
    assert (chunks.start.tolist(), chunks.size.tolist()) == ([0, 4096, 5000], [4096, 904, 10])
    assert (chunks.sent.tolist(), chunks.tensor.tolist()) == ([64, 15, 1], [0, 0, 1])


def test_every_chunk_sends_its_own_largest():
    vector = torch.arange(1.0, 8193.0)
    update = get_codec("sparseloco", top_k=2).encode({"a": vector}).reconstruction
    assert update.indices.tolist() == [4094, 4095, 8190, 8191]


def test_ties_go_to_the_lower_place():
    update = get_codec("sparseloco", top_k=3).encode({"a": -torch.ones(4096)}).reconstruction
    assert update.indices.tolist() == [0, 1, 2]


def test_ratios_to_dense_fp32():
    delta = {f"{i}": torch.randn(512, 512, generator=torch.Generator().manual_seed(i)) for i in range(4)}
    dense = 4 * 4 * 512 * 512
    ratio, updates = {}, []
    for options in ({"packed": False}, {}, {"entropy_coded": True}):
        encoded = get_codec("sparseloco", **options).encode(delta)
        ratio[str(options)] = dense / len(encoded.payload)
        updates.append(encoded.reconstruction)
    # 12 + 8, 12 + 2 bits for each of 64 in 4096
    assert list(ratio.values())[:2] == pytest.approx([32 / (20 / 64), 32 / (14 / 64)], rel=0.003)
    assert ratio["{'entropy_coded': True}"] >= 210
    for other in updates[1:]:
        assert torch.equal(other.indices, updates[0].indices)
        assert torch.equal(other.values, updates[0].values)


@pytest.mark.parametrize("clumpy", [False, True])
def test_coded_places_cost_at_most_the_entropy_of_a_fair_draw(clumpy):
    # sum of -log2 P(gap) <= n H2(1/64), wherever the places lie
    vector = torch.randn(16 * 4096, generator=torch.Generator().manual_seed(0))
    if clumpy:
        vector.view(16, 4096)[:, :64] += 100
    payload = get_codec("sparseloco", entropy_coded=True).encode({"a": vector}).payload
    bound = 16 * 4096 * (6 / 64 + 63 / 64 * -np.log2(63 / 64)) / 8 + 16 * 64 * 2 / 8
    assert len(payload) - 3 - 16 <= 1.003 * bound + 8


def _with(form, k=1024, levels=LEVELS, places=PLACES, values=bytes([0b10_11_10_01])):
    return bytes([form]) + struct.pack("<H", k) + levels + places + values


@pytest.mark.parametrize(
    "payload",
    [
        b"\1",
        _with(3),
        _with(1, k=0),
        _with(1, k=1025),
        _with(1, k=512),
        _with(1)[:10],
        _with(1) + b"\0",
        _with(1)[:-1],
        _with(1, levels=struct.pack("<ffff", 0, float("nan"), 0, 3)),
        _with(1, places=bytes([3, 0x10, 0, 4, 0x60, 0])),
        _with(1, places=bytes([1, 0x10, 0, 4, 0x60, 0])),
        _with(1, places=bytes([1, 0x30, 0, 4, 0, 1])),
        _with(0, values=bytes([1, 2, 4, 2])),
        _with(2),
    ],
)
def test_malformed_payloads_are_refused(payload):
    with pytest.raises(MessageError):
        get_codec("sparseloco").decode(payload, SCHEMA)


def test_coded_gaps_beyond_their_chunk_are_refused():
    other = {"a": torch.cat([torch.zeros(100), torch.ones(1)])}
    payload = get_codec("sparseloco", top_k=1, entropy_coded=True).encode(other).payload
    with pytest.raises(MessageError, match="beyond its chunk"):
        get_codec("sparseloco").decode(payload, SCHEMA)
