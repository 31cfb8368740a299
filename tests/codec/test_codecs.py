"""What every codec promises: decode gives the reconstruction, budgets hold, bytes depend on values alone."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfstq_hf.codec import Schema, get_codec
from fedfstq_hf.errors import BudgetError
from tests.codec.conftest import make_update

CODECS = [
    ("fp32", {}),
    ("fp16", {}),
    ("paper", {}),
    ("fstq", {}),
    ("fstq", {"bits": 1.0}),
    ("fstq", {"fisher_weighted": False}),
]
BUDGETED = [c for c in CODECS if c[0] in ("paper", "fstq")]


def same(one, two):
    # the form is free: what is nearly dense is decoded as such
    return one.num_params == two.num_params and torch.equal(one.to_dense(), two.to_dense())


def distortion(delta, fisher, update):
    schema = Schema.from_state_dict(delta)
    error = schema.flatten(delta) - update.to_dense()
    return float((schema.flatten(fisher) * error.square()).sum())


@pytest.mark.parametrize(("name", "options"), CODECS)
def test_decode_is_the_reconstruction(name, options, update):
    delta, fisher = update
    codec, schema = get_codec(name, **options), Schema.from_state_dict(delta)
    for weights in (fisher, None):
        encoded = codec.encode(delta, weights)
        decoded = codec.decode(encoded.payload, schema)
        assert same(decoded, encoded.reconstruction)
        assert decoded.values.dtype == torch.float32
        assert encoded.params == {}
        if decoded.indices is not None:
            assert (decoded.indices.diff() > 0).all()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_shape_value_and_budget(data):
    name, options = data.draw(st.sampled_from(BUDGETED))
    shapes = data.draw(st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=3), min_size=1, max_size=4))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    scale = data.draw(st.sampled_from([1e-30, 1e-4, 1.0, 1e30]))
    kind = data.draw(st.sampled_from(["normal", "equal", "sparse", "heavy"]))

    def draw(shape):
        normal = rng.standard_normal(shape)
        if kind == "equal":
            return np.sign(normal)
        return normal * (rng.random(shape) < 0.1) if kind == "sparse" else normal**5 if kind == "heavy" else normal

    delta = {str(i): torch.tensor(scale * draw(s), dtype=torch.float32) for i, s in enumerate(shapes)}
    fisher = {k: torch.rand_like(v) for k, v in delta.items()} if data.draw(st.booleans()) else None
    budget = data.draw(st.integers(0, 400))
    codec, schema = get_codec(name, **options), Schema.from_state_dict(delta)
    encoded = codec.encode(delta, fisher, max_bytes=budget)
    assert len(encoded.payload) <= budget
    decoded = codec.decode(encoded.payload, schema)
    assert same(decoded, encoded.reconstruction)
    assert torch.isfinite(decoded.values).all()


@pytest.mark.parametrize(("name", "options"), BUDGETED)
def test_budgets_are_used(name, options):
    delta, fisher = make_update({f"{i}.lora_{s}": (8, 256) if s == "A" else (256, 8) for i in range(6) for s in "AB"})
    for budget in (100, 333, 1000, 2500):
        size = len(get_codec(name, **options).encode(delta, fisher, max_bytes=budget).payload)
        assert 0.97 * budget <= size <= budget


@pytest.mark.parametrize(("name", "options"), CODECS)
def test_bytes_depend_on_values_alone(name, options, update):
    delta, fisher = update
    base = get_codec(name, **options).encode(delta, fisher).payload
    reordered = dict(reversed([(k, v.clone()) for k, v in delta.items()]))
    transposed = {k: v.t().contiguous().t() if v.dim() == 2 else v for k, v in delta.items()}
    doubles = {k: v.double() for k, v in delta.items()}
    for other in (reordered, transposed, doubles):
        assert get_codec(name, **options).encode(other, fisher).payload == base


@pytest.mark.parametrize(("name", "options"), CODECS)
def test_the_default_device_does_not_matter(name, options, update):
    codec = get_codec(name, **options)
    expected = codec.encode(*update)
    # on "meta" nothing can be computed: whatever is made there by default ends in an error
    with torch.device("meta"):
        payload = codec.encode(*update).payload
        decoded = codec.decode(payload, Schema.from_state_dict(update[0]))
        dense = decoded.to_dense()
    assert payload == expected.payload
    assert torch.equal(dense, expected.reconstruction.to_dense())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("name", "options"), CODECS)
def test_cuda_tensors_give_the_same_bytes(name, options, update):
    delta, fisher = update
    on_device = [{k: v.cuda() for k, v in state.items()} for state in (delta, fisher)]
    assert get_codec(name, **options).encode(*on_device).payload == get_codec(name, **options).encode(*update).payload


@pytest.mark.parametrize(("name", "options"), BUDGETED)
def test_nothing_to_send(name, options):
    delta = {"a": torch.zeros(8, 32)}
    encoded = get_codec(name, **options).encode(delta, max_bytes=10)
    assert (encoded.payload, encoded.reconstruction.nnz) == (b"", 0)
    assert get_codec(name, **options).encode(delta).payload == b""
    assert get_codec(name, **options).decode(b"", Schema.from_state_dict(delta)).nnz == 0


@pytest.mark.parametrize(("name", "options"), BUDGETED)
def test_impossible_budget(name, options, update):
    with pytest.raises(BudgetError, match=r"0 bytes.*-7.*raise the uplink budget by at least 7 bytes"):
        get_codec(name, **options).encode(*update, max_bytes=-7)


def test_large_budgets_come_ever_closer():
    delta, fisher = make_update()
    budgets = (30, 60, 120)
    errors = [
        distortion(delta, fisher, get_codec("fstq").encode(delta, fisher, max_bytes=b).reconstruction) for b in budgets
    ]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


def test_the_number_of_threads_does_not_matter():
    generator = torch.Generator().manual_seed(3)
    shapes = {"a": (8, 512), "b": (512, 8), "c": (8, 256), "d": (8, 2600)}
    delta = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    fisher = {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}
    before, payloads = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            payloads.append(get_codec("fstq").encode(delta, fisher, max_bytes=600).payload)
    finally:
        torch.set_num_threads(before)
    assert payloads[0] == payloads[1]
