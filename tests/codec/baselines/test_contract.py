"""What codecs that see no Fisher information promise: decode gives the reconstruction, budgets hold or are refused."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfstq_hf.codec import CodecContext, Schema, get_codec
from fedfstq_hf.errors import BudgetError, ConfigError, MessageError, NonFiniteError
from tests.codec.conftest import make_update

FIXED = [
    ("fedbat", {}),
    ("fedpaq", {}),
    ("fedpaq", {"levels": 1}),
    ("qsgd", {}),
    ("qsgd", {"bits": 2, "norm": "l2"}),
    ("qsgd", {"bits": 8, "bucket": 9}),
    ("signsgd", {}),
]
FITTING = [
    ("sparseloco", {}),
    ("sparseloco", {"packed": False}),
    ("sparseloco", {"entropy_coded": True}),
    ("topk", {}),
    ("topk", {"value_bits": 16}),
    ("topk", {"value_bits": 8}),
    ("topk", {"value_bits": 4}),
    ("fstq", {"fisher_weighted": False}),
]
ALL = FIXED + FITTING
STOCHASTIC = ["fedbat", "fedpaq", "qsgd", "fstq"]


def same(one, two):
    # the form is free: what is nearly dense is decoded as such
    return one.num_params == two.num_params and torch.equal(one.to_dense(), two.to_dense())


@pytest.mark.parametrize(("name", "options"), ALL)
def test_decode_is_the_reconstruction_whatever_options_the_decoder_has(name, options, update):
    delta, fisher = update
    encoded = get_codec(name, **options).encode(delta, fisher)
    decoded = get_codec(name).decode(encoded.payload, Schema.from_state_dict(delta))
    assert same(decoded, encoded.reconstruction)
    assert decoded.values.dtype == torch.float32
    assert encoded.params == {}
    assert decoded.nnz > 0


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_any_shape_value_and_budget(data):
    name, options = data.draw(st.sampled_from(ALL))
    shapes = data.draw(st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=2), min_size=1, max_size=3))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    scale = data.draw(st.sampled_from([0.0, 1e-30, 1e-4, 1.0]))
    density = data.draw(st.sampled_from([0.1, 1.0]))
    delta = {
        str(i): torch.tensor(scale * rng.standard_normal(s) * (rng.random(s) < density), dtype=torch.float32)
        for i, s in enumerate(shapes)
    }
    budget = data.draw(st.integers(0, 600))
    codec, schema = get_codec(name, **options), Schema.from_state_dict(delta)
    try:
        encoded = codec.encode(delta, max_bytes=budget)
    except BudgetError:
        assert (name, options) in FIXED
        assert len(codec.encode(delta).payload) > budget
        return
    assert len(encoded.payload) <= budget
    decoded = codec.decode(encoded.payload, schema)
    assert same(decoded, encoded.reconstruction)
    assert torch.isfinite(decoded.values).all()


@pytest.mark.parametrize(("name", "options"), FITTING)
def test_budgets_are_used(name, options):
    delta, fisher = make_update({f"{i}.lora_{s}": (8, 1024) if s == "A" else (1024, 8) for i in range(4) for s in "AB"})
    # 65,536 parameters; one more per chunk is up to 16 of 20 bits each
    for budget in (1000, 4000):
        size = len(get_codec(name, **options).encode(delta, fisher, max_bytes=budget).payload)
        assert 0.95 * budget <= size <= budget


@pytest.mark.parametrize(("name", "options"), FIXED)
def test_fixed_sizes_are_refused_with_a_remedy(name, options, update):
    size = len(get_codec(name, **options).encode(*update).payload)
    assert len(get_codec(name, **options).encode(*update, max_bytes=size).payload) == size
    with pytest.raises(BudgetError, match=rf"{size} bytes.*leaves {size - 1}; .*fstq"):
        get_codec(name, **options).encode(*update, max_bytes=size - 1)


@pytest.mark.parametrize(("name", "options"), FITTING)
def test_impossible_budget(name, options, update):
    with pytest.raises(BudgetError, match=r"-7.*raise.* by at least 7 bytes"):
        get_codec(name, **options).encode(*update, max_bytes=-7)


@pytest.mark.parametrize(("name", "options"), ALL)
def test_bytes_depend_on_values_alone(name, options, update):
    delta, fisher = update
    base = get_codec(name, **options).encode(delta, fisher).payload
    reordered = dict(reversed([(k, v.clone()) for k, v in delta.items()]))
    transposed = {k: v.t().contiguous().t() if v.dim() == 2 else v for k, v in delta.items()}
    for other in (delta, reordered, transposed, {k: v.double() for k, v in delta.items()}):
        assert get_codec(name, **options).encode(other, fisher).payload == base


@pytest.mark.parametrize(("name", "options"), ALL)
def test_the_fisher_is_not_used(name, options, update):
    delta, fisher = update
    assert get_codec(name, **options).encode(delta, fisher).payload == get_codec(name, **options).encode(delta).payload


@pytest.mark.parametrize("name", STOCHASTIC)
def test_draws_differ_by_seed_round_and_update(name, update):
    delta, _ = update
    base = get_codec(name).encode(delta, context=CodecContext(round=1)).payload
    assert get_codec(name).encode(delta, context=CodecContext(round=1)).payload == base
    assert get_codec(name, seed=1).encode(delta, context=CodecContext(round=1)).payload != base
    assert get_codec(name).encode(delta, context=CodecContext(round=2)).payload != base


@pytest.mark.parametrize("name", STOCHASTIC[:3])
def test_stochastic_rounding_is_unbiased(name):
    vector = torch.linspace(-1, 1, 64)
    seeds = 400
    mean = sum(get_codec(name, seed=s).encode({"a": vector}).reconstruction.values for s in range(seeds)) / seeds
    # fedbat is unbiased within +-alpha, the mean magnitude; qsgd and fedpaq everywhere
    inside = vector.abs() <= (vector.abs().mean() if name == "fedbat" else 1)
    assert (mean - vector)[inside].abs().max() < 0.15
    assert (mean - vector)[inside].mean().abs() < 0.02


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fedbat", {"seed": "x"}),
        ("fedpaq", {"levels": 0}),
        ("fedpaq", {"levels": 128}),
        ("fedpaq", {"seed": 0.5}),
        ("qsgd", {"bits": 1}),
        ("qsgd", {"bits": 9}),
        ("qsgd", {"bucket": 7}),
        ("qsgd", {"norm": "l1"}),
        ("qsgd", {"seed": None}),
        ("sparseloco", {"top_k": 0}),
        ("sparseloco", {"top_k": 1025}),
        ("sparseloco", {"packed": 1}),
        ("sparseloco", {"entropy_coded": "yes"}),
        ("topk", {"density": 0.3}),
        ("topk", {"value_bits": 5}),
        ("fstq", {"bits": 0}),
        ("fstq", {"bits": 1.5}),
        ("fstq", {"seed": True}),
    ],
)
def test_option_values_are_checked(name, options):
    with pytest.raises(ConfigError, match=f"{name} {next(iter(options))}"):
        get_codec(name, **options)


def test_norms_beyond_float32_are_refused():
    huge = {"a": torch.full((8,), 3e38)}
    for codec in (get_codec("fedpaq"), get_codec("qsgd", norm="l2")):
        with pytest.raises(NonFiniteError, match="beyond float32"):
            codec.encode(huge)
    with pytest.raises(NonFiniteError, match="value_bits to 32"):
        get_codec("topk", value_bits=16).encode(huge)


@pytest.mark.parametrize(("name", "options"), ALL)
def test_an_adapter_without_coordinates(name, options):
    delta = {"a": torch.zeros(0, 4)}
    codec, schema = get_codec(name, **options), Schema.from_state_dict(delta)
    assert codec.decode(codec.encode(delta).payload, schema).nnz == 0
    with pytest.raises(MessageError):
        codec.decode(bytes(9), schema)
