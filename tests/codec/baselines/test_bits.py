"""Fixed-width packing: hand-made bytes, round trips across block borders, refusal of everything else."""

import numpy as np
import pytest

from fedfstq_hf.codec.coding.bits import pack_bits, read_floats, unpack_bits
from fedfstq_hf.errors import MessageError


def test_lowest_bits_come_first():
    # 1, 3, 6 in 3 bits each: 001, 011, 110 -> 0b1 10 011 001 with the last bit in the next byte
    assert pack_bits(np.array([1, 3, 6]), 3) == bytes([0b10011001, 0b1])


@pytest.mark.parametrize("width", [1, 2, 3, 8, 12, 26])
@pytest.mark.parametrize("count", [0, 1, 7, 65_536, 65_537])
def test_round_trip(width, count):
    values = np.random.default_rng(0).integers(0, 1 << width, count)
    data = pack_bits(values, width)
    assert len(data) == -(-count * width // 8)
    assert np.array_equal(unpack_bits(data, count, width), values)


def test_lengths_and_padding_are_checked():
    data = pack_bits(np.array([1, 3, 6]), 3)
    for bad in (data + b"\0", data[:-1], data[:-1] + b"\3", data[:-1] + b"\x81"):
        with pytest.raises(MessageError):
            unpack_bits(bad, 3, 3)


@pytest.mark.parametrize("bad", [-1.0, -0.0, np.nan, np.inf])
def test_magnitudes_are_finite_and_not_negative(bad):
    with pytest.raises(MessageError, match="scale"):
        read_floats(np.array([1, bad], dtype="<f4").tobytes(), 2, "scale")
