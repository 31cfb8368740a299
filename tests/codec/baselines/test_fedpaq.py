"""fedpaq: one norm for the whole update, levels worked out by hand."""

import struct

import pytest
import torch

from fedfstq_hf.codec import Schema, get_codec
from fedfstq_hf.errors import MessageError


def test_values_on_a_level_are_exact():
    # the norm over both tensors is 5, and s = 5 makes its fifths the levels
    encoded = get_codec("fedpaq", levels=5).encode({"a": torch.tensor([3.0]), "b": torch.tensor([-4.0, 0.0])})
    assert encoded.reconstruction.values.tolist() == pytest.approx([3.0, -4.0, 0.0])
    assert encoded.payload[:5] == b"\5" + struct.pack("<f", 5.0)


def test_one_level_sends_signs_of_the_norm():
    draws = [
        get_codec("fedpaq", levels=1, seed=seed).encode({"a": torch.tensor([3.0, -4.0])}).reconstruction.values.tolist()
        for seed in range(300)
    ]
    assert {tuple(d) for d in draws} == {(0.0, 0.0), (5.0, 0.0), (0.0, -5.0), (5.0, -5.0)}
    assert sum(d[0] == 5 for d in draws) / 300 == pytest.approx(0.6, abs=0.1)
    assert sum(d[1] == -5 for d in draws) / 300 == pytest.approx(0.8, abs=0.1)


def test_an_update_of_zeros():
    delta = {"a": torch.zeros(9)}
    encoded = get_codec("fedpaq").encode(delta)
    assert encoded.reconstruction.values.tolist() == [0.0] * 9
    assert get_codec("fedpaq").decode(encoded.payload, Schema.from_state_dict(delta)).values.tolist() == [0.0] * 9


def test_size_is_near_the_entropy_of_the_levels():
    delta = {"a": torch.randn(20_000)}
    encoded = get_codec("fedpaq", levels=100).encode(delta)
    counts = torch.unique(encoded.reconstruction.values, return_counts=True)[1].double() / 20_000
    entropy = float(-(counts * counts.log2()).sum()) * 20_000 / 8
    assert 5 <= len(encoded.payload) - entropy < 0.002 * entropy + 2 * 201 + 10


@pytest.mark.parametrize("change", [b"\0", b"\x80", b"\5\0\0\x80\x7f", b"\5\0\0\0\x80"])
def test_malformed_heads_are_refused(change):
    delta = {"a": torch.randn(9)}
    payload = get_codec("fedpaq", levels=5).encode(delta).payload
    with pytest.raises(MessageError):
        get_codec("fedpaq").decode(change + payload[len(change) :], Schema.from_state_dict(delta))
