"""qsgd: levels, probabilities and bytes worked out by hand."""

import struct

import numpy as np
import pytest
import torch

from fedfstq_hf.codec import Schema, get_codec
from fedfstq_hf.codec.baselines.qsgd import bucket_norms, stochastic_levels
from fedfstq_hf.errors import MessageError

CODES = bytes([0b01_01_00_10, 0b01_01_01_01, 0b10_01])


def test_levels_round_up_with_the_fraction_as_probability():
    # ||(3, -4)|| = 5, s = 3: 3 * 3/5 = 1.8 goes up below 0.8, 3 * 4/5 = 2.4 below 0.4
    values, scale = np.array([3.0, -4.0, 0.0]), np.array([5.0, 5.0, 5.0])
    for uniform, expected in ((0.3, [2, -3, 0]), (0.5, [2, -2, 0]), (0.9, [1, -2, 0])):
        assert stochastic_levels(values, scale, 3, np.full(3, uniform)).tolist() == expected


def test_norms_are_per_bucket():
    values = np.array([3.0, -4.0, 0.0, 1.0, -2.0])
    assert bucket_norms(values, 2, "l2").tolist() == [5.0, 1.0, 2.0]
    assert bucket_norms(values, 2, "max").tolist() == [4.0, 1.0, 2.0]


def test_payload_byte_by_byte():
    # s = 1 and every value on a level; codes of 2 bits: 2, 0, then ones, 2
    delta = {"a": torch.tensor([2.0, -2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 4.0])}
    encoded = get_codec("qsgd", bits=2, bucket=8).encode(delta)
    assert encoded.payload == b"\2" + struct.pack("<Iff", 8, 2.0, 4.0) + CODES
    assert encoded.reconstruction.values.tolist() == delta["a"].tolist()


def test_bits_per_coordinate():
    delta = {"a": torch.randn(5120)}
    assert len(get_codec("qsgd").encode(delta).payload) == 5 + 4 * 10 + 5120 // 2


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\2" + struct.pack("<Iff", 8, 2.0, 4.0) + CODES[:2] + b"\x0d",  # code 3
        b"\2" + struct.pack("<Iff", 7, 2.0, 4.0) + CODES,
        b"\2" + struct.pack("<Iff", 8, -2.0, 4.0) + CODES,
        b"\2" + struct.pack("<Iff", 8, float("nan"), 4.0) + CODES,
        b"\2" + struct.pack("<If", 8, 2.0) + CODES,
        b"\1" + struct.pack("<Iff", 8, 2.0, 4.0) + CODES,
        b"\x09" + struct.pack("<Iff", 8, 2.0, 4.0) + bytes(12),
        b"\2" + struct.pack("<Iff", 8, 2.0, 4.0) + CODES + b"\0",
    ],
)
def test_malformed_payloads_are_refused(payload):
    with pytest.raises(MessageError):
        get_codec("qsgd").decode(payload, Schema.from_state_dict({"a": torch.zeros(10)}))
