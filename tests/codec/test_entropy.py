"""Entropy coding: exact round trips, sizes near the entropy, malformed streams refused."""

import math

import numpy as np
import pytest

from fedfstq_hf.codec.coding.entropy import Adaptive, Reader, Writer, coin, table, uniform
from fedfstq_hf.errors import MessageError


def test_mixed_stream_round_trips_in_order():
    writer = Writer()
    writer.put([3], uniform(4))
    writer.put([0, 2, 1, 1, 0], table([5, 1, 2]))
    writer.put_adaptive([40, 41, 39, 0], Adaptive(48))
    writer.put([], uniform(2))
    writer.put([1, 0, 0], coin(1, 7))
    data = writer.finish(tail=[1, 0, 0, 1, 1])
    reader = Reader(data)
    assert reader.get(1, uniform(4)).tolist() == [3]
    assert reader.get(5, table([5, 1, 2])).tolist() == [0, 2, 1, 1, 0]
    assert reader.get_adaptive(4, Adaptive(48)) == [40, 41, 39, 0]
    assert reader.get(0, uniform(2)).tolist() == []
    assert reader.get(3, coin(1, 7)).tolist() == [1, 0, 0]
    assert reader.finish(tail=5).take(5).tolist() == [1, 0, 0, 1, 1]


@pytest.mark.parametrize("p", [0.003, 0.05, 0.4])
def test_size_is_the_entropy(p):
    bits = np.random.default_rng(0).random(100_000) < p
    writer = Writer()
    writer.put(bits, table([1 - p, p]))
    ones = bits.sum()
    ideal = -(ones * math.log2(p) + (bits.size - ones) * math.log2(1 - p)) / 8
    assert ideal - 1 <= len(writer.finish()) <= 1.001 * ideal + 4


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 24, 31, 32, 33, 1000])
def test_tail_bits_cost_one_bit_each(size):
    tail = np.random.default_rng(size).integers(0, 2, size)
    data = Writer().finish(tail=tail)
    assert len(data) <= size // 8 + 1
    assert Reader(data).finish(tail=size).take(size).tolist() == tail.tolist()
    for wrong in {max(size - 1, 0), size + 1, size + 40} - {size}:
        with pytest.raises(MessageError):
            Reader(data).finish(tail=wrong)


def test_impossible_symbols_still_code():
    writer = Writer()
    writer.put([1], table([1.0, 0.0]))
    reader = Reader(writer.finish())
    assert reader.get(1, table([1.0, 0.0])).tolist() == [1]
    reader.finish()


def test_adaptive_learns():
    def cost(symbols):
        writer = Writer()
        writer.put_adaptive(symbols, Adaptive(48))
        return len(writer.finish())

    assert cost([20] * 200) < 25 < 100 < cost(np.random.default_rng(0).integers(0, 48, 200).tolist())


@pytest.mark.parametrize("data", [b"", b"\0", b"abc\0"])
def test_streams_that_no_writer_makes_are_refused(data):
    with pytest.raises(MessageError):
        Reader(data)


def test_unread_symbols_are_refused():
    writer = Writer()
    writer.put([1, 2, 3], uniform(200))
    reader = Reader(writer.finish())
    reader.get(2, uniform(200))
    with pytest.raises(MessageError, match="does not end"):
        reader.finish()
