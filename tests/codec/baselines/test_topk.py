"""topk: bytes worked out by hand, ties, refusals."""

import struct

import pytest
import torch

from fedfstq_hf.codec import Schema, get_codec
from fedfstq_hf.errors import MessageError

DELTA = {"a": torch.tensor([0.5, -3.0]), "b": torch.tensor([0.0, 2.0, 1.0])}
SCHEMA = Schema.from_state_dict(DELTA)
INDICES = bytes([1 | 3 << 3])  # coordinates 1 and 3 of 5, 3 bits each


@pytest.mark.parametrize(
    ("value_bits", "values", "expected"),
    [
        (32, struct.pack("<ff", -3, 2), [-3.0, 2.0]),
        (16, struct.pack("<ee", -3, 2), [-3.0, 2.0]),
        # 2 * 127 / 3 = 84.67, 2 * 7 / 3 = 4.67
        (8, struct.pack("<f", 3) + bytes([0, 85 + 127]), [-3.0, 85 / 127 * 3]),
        (4, struct.pack("<f", 3) + bytes([0 | 12 << 4]), [-3.0, 5 / 7 * 3]),
    ],
)
def test_payload_byte_by_byte(value_bits, values, expected):
    encoded = get_codec("topk", value_bits=value_bits).encode(DELTA, max_bytes=14)
    assert encoded.payload == bytes([value_bits]) + struct.pack("<I", 2) + INDICES + values
    assert encoded.reconstruction.indices.tolist() == [1, 3]
    assert encoded.reconstruction.values.tolist() == pytest.approx(expected)


def test_ties_go_to_the_lower_coordinate():
    update = get_codec("topk", density=0.1).encode({"a": torch.ones(40)}).reconstruction
    assert update.indices.tolist() == [0, 1, 2, 3]


def test_zeros_are_not_sent():
    delta = {"a": torch.tensor([0.0, 1.0, *[0.0] * 10])}
    assert get_codec("topk").encode(delta, max_bytes=100).reconstruction.indices.tolist() == [1]
    assert get_codec("topk").encode({"a": torch.zeros(4)}).payload == b""


@pytest.mark.parametrize(("budget", "count"), [(0, 0), (9, 0), (10, 1), (13, 1), (14, 2), (100, 2)])
def test_as_many_as_fit_up_to_a_quarter(budget, count):
    # 5 bytes, 3 bits per index, 4 bytes per value
    assert get_codec("topk").encode(DELTA, max_bytes=budget).reconstruction.nnz == count


@pytest.mark.parametrize(
    "payload",
    [
        b"\x20",
        bytes([5]) + struct.pack("<I", 2) + INDICES + bytes(8),
        bytes([32]) + struct.pack("<I", 0),
        bytes([32]) + struct.pack("<I", 6) + bytes(24 + 3),
        bytes([32]) + struct.pack("<I", 2**32 - 1) + bytes(9),
        bytes([32]) + struct.pack("<I", 2) + bytes([3 | 1 << 3]) + struct.pack("<ff", 1, 1),
        bytes([32]) + struct.pack("<I", 2) + bytes([3 | 3 << 3]) + struct.pack("<ff", 1, 1),
        bytes([32]) + struct.pack("<I", 2) + bytes([1 | 5 << 3]) + struct.pack("<ff", 1, 1),
        bytes([32]) + struct.pack("<I", 2) + bytes([1 | 3 << 3 | 64]) + struct.pack("<ff", 1, 1),
        bytes([32]) + struct.pack("<I", 2) + INDICES + struct.pack("<ff", 1, float("inf")),
        bytes([16]) + struct.pack("<I", 2) + INDICES + struct.pack("<ee", 1, float("nan")),
        bytes([4]) + struct.pack("<I", 2) + INDICES + struct.pack("<f", -1) + b"\0",
        bytes([4]) + struct.pack("<I", 2) + INDICES + struct.pack("<f", 1) + b"\xf0",
        bytes([32]) + struct.pack("<I", 2) + INDICES + struct.pack("<ff", 1, 1) + b"\0",
    ],
)
def test_malformed_payloads_are_refused(payload):
    with pytest.raises(MessageError):
        get_codec("topk").decode(payload, SCHEMA)
