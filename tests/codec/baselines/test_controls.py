"""Controls: random support and uniform Fisher differ from `fstq` in the one thing that they are to control for."""

import torch

from fedfstq_hf.codec import Schema, get_codec
from tests.codec.conftest import make_update


def test_random_support_does_not_look_at_magnitudes():
    delta = {"a": torch.cat([torch.ones(5000), 1000 * torch.ones(5000)])}
    update = get_codec("random", density=0.1).encode(delta).reconstruction
    assert update.nnz == 1000
    # binomial with p = 1/2: standard deviation 16
    assert 400 < int((update.indices < 5000).sum()) < 600


def test_random_sends_the_mean_magnitude_and_signs():
    delta = {"a": torch.tensor([1.0, -3.0, 0.0])}
    update = get_codec("random", density=1.0).encode(delta).reconstruction
    assert update.to_dense().tolist() == [2.0, -2.0, 0.0]


def test_random_pays_for_its_indices():
    # at 2 % density: H2(0.02) + 0.02 signs = 0.161 bit per coordinate at least, whatever the data
    delta, _ = make_update({"a": (8, 4096)})
    size = len(get_codec("random", density=0.02).encode(delta).payload)
    assert 0.97 * 0.161 * 8 * 4096 / 8 < size < 1.05 * 0.161 * 8 * 4096 / 8


def test_uniform_fisher_is_fstq_without_a_fisher(update):
    delta, fisher = update
    blind = get_codec("uniform-fisher").encode(delta, fisher, max_bytes=200)
    assert blind.payload == get_codec("fstq").encode(delta, None, max_bytes=200).payload
    assert blind.payload != get_codec("fstq").encode(delta, fisher, max_bytes=200).payload
    schema = Schema.from_state_dict(delta)
    decoded = get_codec("uniform-fisher").decode(blind.payload, schema)
    assert torch.equal(decoded.to_dense(), get_codec("fstq").decode(blind.payload, schema).to_dense())
