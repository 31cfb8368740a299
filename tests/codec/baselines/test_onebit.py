"""signsgd and fedbat: one bit per coordinate, worked out by hand."""

import struct

import numpy as np
import pytest
import torch

from fedfstq_hf.codec import Schema, get_codec
from fedfstq_hf.codec.baselines import onebit
from fedfstq_hf.errors import MessageError

DELTA = {"a": torch.tensor([1.0, -3.0]), "b": torch.tensor([-1.0, 0.0, 0.5])}
SCHEMA = Schema.from_state_dict(DELTA)


def test_signsgd_sends_signs_and_the_mean_magnitude_of_each_tensor():
    encoded = get_codec("signsgd").encode(DELTA)
    assert encoded.payload == struct.pack("<ff", 2.0, 0.5) + bytes([0b00110])
    assert encoded.reconstruction.values.tolist() == [2.0, -2.0, -0.5, 0.5, 0.5]


def test_fedbat_is_positive_with_half_of_one_plus_the_ratio(monkeypatch):
    # alpha 2 and 0.5: ratios 0.5, -1.5, -2, 0, 1 -> probabilities 0.75, 0 (-0.25), 0, 0.5, 1
    for uniform, expected in (
        (0.4, [2, -2, -0.5, 0.5, 0.5]),
        (0.6, [2, -2, -0.5, -0.5, 0.5]),
        (0.8, [-2, -2, -0.5, -0.5, 0.5]),
    ):
        monkeypatch.setattr(onebit, "draws", lambda vector, seed, round, u=uniform: np.full(vector.numel(), u))
        assert get_codec("fedbat").encode(DELTA).reconstruction.values.tolist() == expected


@pytest.mark.parametrize("seed", range(5))
def test_fedbat_passes_on_what_training_has_binarised(seed):
    delta = {"a": torch.tensor([0.25, -0.25, -0.25]), "b": torch.tensor([-3.0, 3.0])}
    update = get_codec("fedbat", seed=seed).encode(delta).reconstruction
    assert update.values.tolist() == [0.25, -0.25, -0.25, -3.0, 3.0]


def test_an_empty_or_zero_tensor_has_magnitude_zero():
    update = get_codec("fedbat").encode({"a": torch.zeros(0), "b": torch.zeros(3), "c": torch.ones(1)}).reconstruction
    assert update.values.abs().tolist() == [0.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize("name", ["signsgd", "fedbat"])
@pytest.mark.parametrize(
    "payload",
    [
        b"",
        struct.pack("<ff", 2.0, 0.5),
        struct.pack("<ff", 2.0, 0.5) + bytes([0b100110]),
        struct.pack("<ff", 2.0, 0.5) + bytes([6, 0]),
        struct.pack("<ff", 2.0, -0.5) + bytes([6]),
        struct.pack("<ff", 2.0, float("inf")) + bytes([6]),
    ],
)
def test_malformed_payloads_are_refused(name, payload):
    with pytest.raises(MessageError, match="payload"):
        get_codec(name).decode(payload, SCHEMA)
