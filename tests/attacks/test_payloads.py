"""Hostile payloads behind a valid digest: every decoder refuses them, or decodes them to a sane update."""

import random
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfstq_hf.codec import Schema, get_codec
from fedfstq_hf.codec.coding import index_coding
from fedfstq_hf.codec.coding.entropy import Adaptive, Writer, table, uniform
from fedfstq_hf.codec.coding.index_coding import Layout
from fedfstq_hf.errors import MessageError
from tests.attacks.corpus import CODECS, SCHEMA, TARGETS, outcome, shortest

# codecs whose payload has a fixed size, or a length that a shorter or longer one contradicts
EXACT = ["fedbat", "fp16", "fp32", "qsgd", "signsgd", "topk"]
OTHER = Schema.from_state_dict({"a": torch.zeros(16, 16)})
BAD_FLOATS = [float("nan"), float("inf"), -float("inf"), struct.unpack("<f", b"\1\0\x80\x7f")[0]]


@pytest.mark.parametrize("name", CODECS)
def test_the_sources_are_valid(name):
    for payload in TARGETS[name].payloads:
        assert outcome(name, payload) == "decoded"


@pytest.mark.parametrize("name", CODECS)
def test_truncated_at_every_byte(name):
    payload = shortest(name)
    outcomes = [outcome(name, payload[:size]) for size in range(1, len(payload))]
    allowed = 0 if name in EXACT else 0.1 * len(payload) + 2
    assert outcomes.count("decoded") <= allowed


@pytest.mark.parametrize("name", CODECS)
def test_extended(name):
    payload = shortest(name)
    for extra in (b"\0", b"\1", b"\xff", payload, bytes(1000)):
        assert outcome(name, payload + extra) == "refused" or name not in EXACT
        assert outcome(name, extra + payload) == "refused" or name not in EXACT


@pytest.mark.parametrize("name", CODECS)
def test_every_bit_flipped(name):
    payload = shortest(name)
    for bit in range(0, min(8 * len(payload), 700), 3):
        flipped = bytearray(payload)
        flipped[bit // 8] ^= 1 << bit % 8
        outcome(name, bytes(flipped))


@pytest.mark.parametrize("name", CODECS)
def test_payloads_of_other_codecs(name):
    for other in CODECS:
        if {name, other} != {"fedbat", "signsgd"}:
            for payload in TARGETS[other].payloads[:2]:
                outcome(name, payload)


@pytest.mark.parametrize("name", CODECS)
def test_a_payload_for_another_adapter(name):
    # an entropy-coded payload of another adapter is well formed by chance only, one of fixed size never
    refused = [outcome(name, payload, OTHER) == "refused" for payload in TARGETS[name].payloads]
    assert all(refused) if name in EXACT else any(refused)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 5, 8, 9, 64, 1000, 100_000])
def test_constant_and_random_bytes(name, size):
    for payload in (bytes(size), b"\xff" * size, b"\1" * size, random.Random(size).randbytes(size)):
        outcome(name, payload)


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("bad", BAD_FLOATS)
def test_nan_and_infinity_at_every_byte(name, bad):
    payload = max(TARGETS[name].payloads, key=len) if name == "fp16" else shortest(name)
    for position in range(min(len(payload) - 3, 100)):
        outcome(name, payload[:position] + struct.pack("<f", bad) + payload[position + 4 :])


@pytest.mark.parametrize("name", CODECS)
@settings(max_examples=30, deadline=None)
@given(data=st.binary(max_size=300))
def test_any_bytes(name, data):
    outcome(name, data)


@pytest.mark.parametrize("name", CODECS)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_splice_of_two_valid_payloads(name, data):
    one, two = (data.draw(st.sampled_from(TARGETS[name].payloads)) for _ in range(2))
    cut, start = data.draw(st.integers(0, len(one))), data.draw(st.integers(0, len(two)))
    outcome(name, one[:cut] + two[start:])


def _support(writer, indices):
    layout = Layout.of(SCHEMA)
    index_coding.write(writer, layout, indices, index_coding.plan(layout, layout.columns_of(indices)[0]))
    return layout


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -float("inf"), -1.0])
def test_paper_scales_inside_a_well_formed_stream(scale):
    writer = Writer()
    _support(writer, np.array([0]))
    writer.put([1, 0, 0], uniform(64))
    writer.put([0], table([1, 0, 0]))
    writer.put(np.frombuffer(struct.pack("<f", scale), dtype=np.uint8), uniform(256))
    writer.put([2], uniform(4))
    with pytest.raises(MessageError, match="scale"):
        get_codec("paper").decode(writer.finish(), SCHEMA)


def test_paper_values_beyond_their_width():
    writer = Writer()
    _support(writer, np.array([0]))
    writer.put([1, 0, 0], uniform(64))
    writer.put([0], table([1, 0, 0]))
    writer.put(np.frombuffer(struct.pack("<f", 1.0), dtype=np.uint8), uniform(256))
    writer.put([3], uniform(4))
    with pytest.raises(MessageError, match="2-bit value"):
        get_codec("paper").decode(writer.finish(), SCHEMA)


def test_coordinators_can_add_up_a_thousand_of_the_largest():
    acc = torch.zeros(SCHEMA.num_params, dtype=torch.float64)
    largest = np.full(SCHEMA.num_params, np.finfo(np.float32).max, dtype="<f4").tobytes()
    update = get_codec("fp32").decode(largest, SCHEMA)
    for _ in range(1000):
        update.add_to(acc, float(2**53))
    assert torch.isfinite(acc).all()


def test_fstq_at_the_largest_magnitude_of_the_grid():
    # the grid ends below float32's largest: everything that can be said is finite
    writer = Writer()
    writer.put([0, 0, 0, 0, 0, 0, 0, 1], uniform(256))
    writer.put_adaptive([1024] * len(SCHEMA.tensors), Adaptive(1025))
    assert outcome("fstq", writer.finish(tail=np.ones(1))) == "decoded"
