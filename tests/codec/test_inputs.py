"""fp32, fp16: exact bytes, refusal of what cannot be sent, and the input checks that all codecs share."""

import numpy as np
import pytest
import torch

from fedfstq_hf.codec import Schema, codec_names, get_codec
from fedfstq_hf.errors import AdapterMismatchError, BudgetError, ConfigError, MessageError, NonFiniteError

DELTA = {"b": torch.tensor([0.5]), "a": torch.tensor([1.0, -2.0])}
SCHEMA = Schema.from_state_dict(DELTA)


def test_fp32_is_the_vector():
    encoded = get_codec("fp32").encode(DELTA)
    assert encoded.payload == np.array([1, -2, 0.5], dtype="<f4").tobytes()
    assert get_codec("fp32").decode(encoded.payload, SCHEMA).to_dense().tolist() == [1, -2, 0.5]


def test_fp16_rounds_to_nearest():
    delta = {"a": torch.tensor([1.0, 1 / 3])}
    encoded = get_codec("fp16").encode(delta)
    assert encoded.payload == np.array([1, 1 / 3], dtype="<f2").tobytes()
    assert encoded.reconstruction.values.tolist() == [1.0, float(np.float16(1 / 3))]


def test_fp16_refuses_overflow():
    with pytest.raises(NonFiniteError, match="fp32"):
        get_codec("fp16").encode({"a": torch.tensor([1e5])})


@pytest.mark.parametrize(("name", "size"), [("fp32", 12), ("fp16", 6)])
def test_dense_budgets_and_lengths(name, size):
    codec = get_codec(name)
    assert len(codec.encode(DELTA, max_bytes=size).payload) == size
    with pytest.raises(BudgetError, match=f'"{size}B"'):
        codec.encode(DELTA, max_bytes=size - 1)
    for wrong in (bytes(size - 1), bytes(size + 1), b""):
        with pytest.raises(MessageError, match="bytes"):
            codec.decode(wrong, SCHEMA)
    with pytest.raises(MessageError, match="NaN"):
        codec.decode(b"\xff" * size, SCHEMA)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", codec_names())
def test_every_codec_refuses_non_finite_updates(name, bad):
    with pytest.raises(NonFiniteError, match="'b'"):
        get_codec(name).encode({"a": torch.ones(3), "b": torch.tensor([0.0, bad])})


@pytest.mark.parametrize("name", ["fstq", "paper", "uniform"])
def test_fisher_is_checked(name):
    codec, delta = get_codec(name), {"a": torch.ones(2)}
    with pytest.raises(NonFiniteError, match="Fisher"):
        codec.encode(delta, {"a": torch.tensor([1.0, float("nan")])})
    with pytest.raises(ConfigError, match="negative"):
        codec.encode(delta, {"a": torch.tensor([1.0, -1.0])})
    with pytest.raises(AdapterMismatchError):
        codec.encode(delta, {"b": torch.ones(2)})
