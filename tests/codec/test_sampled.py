"""sampled: the sample is the message's own, signs keep an update's length, and their mean over clients is unbiased."""

import numpy as np
import pytest
import torch

from fedfstq_hf.codec import CodecContext, Schema, get_codec
from fedfstq_hf.codec.flips import flips, hashed
from fedfstq_hf.codec.sampled import ticket
from tests.codec.conftest import make_update

SHAPES = {"0.lora_A": (8, 512), "0.lora_B": (512, 8), "1.lora_A": (8, 512), "1.lora_B": (512, 8)}
DELTA = make_update(SHAPES)[0]
VECTOR = Schema.from_state_dict(DELTA).flatten(DELTA)


def sent(bits=0.1, delta=DELTA, block=None, seed=0, **more):
    return get_codec("sampled", bits=bits, block=block, seed=seed).encode(delta, **more).reconstruction.to_dense()


def test_tickets_and_flips_are_what_the_specification_says():
    def by_hand(seed, i):
        h = i ^ seed
        h = (h ^ h >> 16) * 0x85EBCA6B & 0xFFFFFFFF
        h = (h ^ h >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
        return h ^ h >> 16

    for seed in (0, 1, 0xDEADBEEF, 0xFFFFFFFF):
        h = hashed(seed, 70_000, 70_040)
        assert ticket(h).tolist() == [by_hand(seed, i) >> 16 for i in range(70_000, 70_040)]
        assert flips(h).tolist() == [by_hand(seed, i) & 1 for i in range(70_000, 70_040)]


def test_tickets_and_flips_are_spread_evenly_and_differ_by_seed():
    one, other = hashed(3, 0, 1 << 20), hashed(4, 0, 1 << 20)
    counts = np.bincount(ticket(one) >> 12, minlength=16)
    assert abs(counts / 65536 - 1).max() < 0.02
    low = ticket(one) < 6554
    assert (low & (ticket(other) < 6554)).mean() == pytest.approx(0.01, rel=0.1)
    assert flips(one)[low].mean() == pytest.approx(0.5, abs=0.01)
    assert (flips(one) ^ flips(other)).mean() == pytest.approx(0.5, abs=0.01)


def test_single_signs_are_the_update_s_own():
    dense = sent(0.25, block=1)
    chosen = dense != 0
    assert chosen.double().mean() == pytest.approx(0.25, abs=0.02)
    assert torch.equal(dense[chosen].sign(), VECTOR[chosen].sign())


@pytest.mark.parametrize("block", [1, 4, 64])
def test_a_tensor_has_one_magnitude(block):
    dense = sent(0.1, block=block)
    for spec in Schema.from_state_dict(DELTA).tensors:
        assert len(set(dense[spec.offset :][: spec.size].abs().tolist()) - {0.0}) == 1


@pytest.mark.parametrize(("bits", "block"), [(1.0, 1), (0.75, 4), (0.3125, 16), (7 / 64, 64)])
def test_codewords_of_all_coordinates_have_the_length_of_the_update_in_its_direction(bits, block):
    dense = sent(bits, block=block)
    assert (dense != 0).double().mean() > 0.99
    # within the half step of the grid of magnitudes
    assert float(dense @ VECTOR / (VECTOR @ VECTOR)) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize(("block", "error"), [(None, 9.4), (1, 14.7)])
def test_the_error_is_that_of_its_codewords(block, error):
    normal = {name: torch.randn(shape, generator=torch.Generator().manual_seed(1)) for name, shape in SHAPES.items()}
    vector = Schema.from_state_dict(normal).flatten(normal)
    found = [float((sent(0.1, normal, block, seed) - vector).square().sum()) for seed in range(10)]
    assert sum(found) / len(found) / float(vector.square().sum()) == pytest.approx(error, rel=0.03)


def errors_of_the_mean(delta, clients, block=None):
    """Relative error of the mean of so many messages, and its length along the update, tensor by tensor."""
    vector = Schema.from_state_dict(delta).flatten(delta)
    mean = torch.stack([sent(0.1, delta, block, seed) for seed in range(clients)]).mean(0)
    for spec in Schema.from_state_dict(delta).tensors:
        found, exact = (x[spec.offset :][: spec.size] for x in (mean, vector))
        yield float((found - exact).norm() / exact.norm()), float(found @ exact / (exact @ exact))


def test_the_mean_over_clients_comes_close_to_the_update_in_every_tensor():
    clients = 400
    alone = float((sent(0.1) - VECTOR).norm() / VECTOR.norm())
    for error, length in errors_of_the_mean(DELTA, clients):
        assert error == pytest.approx(alone / clients**0.5, rel=0.3)
        assert length == pytest.approx(1.0, abs=0.05)


def test_large_coordinates_are_flattened_less_than_by_single_signs():
    one_row = {name: tensor.clone() for name, tensor in DELTA.items()}
    one_row["0.lora_A"][1:] = 0  # all of the tensor's length in an eighth of its coordinates
    error, length = next(errors_of_the_mean(one_row, 400))
    signs, _ = next(errors_of_the_mean(one_row, 400, block=1))
    assert 0.85 < length < 1.0
    assert error < 0.5 * signs


def test_single_signs_come_close_to_what_all_signs_say():
    clients = 400
    mean = torch.stack([sent(0.1, block=1, seed=seed) for seed in range(clients)]).mean(0)
    every = sent(1.0, block=1)
    assert float((mean - every).norm() / every.norm()) == pytest.approx((9 / clients) ** 0.5, rel=0.1)


@pytest.mark.parametrize("block", [None, 1, 4, 256])
def test_what_is_read_is_what_was_written(block):
    for size in range(20, 1500, 37):
        encoded = get_codec("sampled", block=block).encode(DELTA, max_bytes=size)
        assert len(encoded.payload) <= size
        decoded = get_codec("sampled").decode(encoded.payload, Schema.from_state_dict(DELTA))
        assert torch.equal(decoded.to_dense(), encoded.reconstruction.to_dense())


def test_an_update_of_zeros_is_an_empty_message_and_a_tensor_of_zeros_takes_no_signs():
    zeros = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    assert get_codec("sampled").encode(zeros).payload == b""
    one = {**zeros, "1.lora_B": DELTA["1.lora_B"]}
    payload = get_codec("sampled").encode(one, max_bytes=100).payload
    dense = get_codec("sampled").decode(payload, Schema.from_state_dict(one)).to_dense()
    assert not dense[: 3 * 4096].any()
    assert int((dense != 0).sum()) > 3800
    payload = get_codec("sampled", block=1).encode(one, max_bytes=100).payload
    dense = get_codec("sampled").decode(payload, Schema.from_state_dict(one)).to_dense()
    assert 650 < int((dense != 0).sum()) < 800  # 100 bytes, 90 of them signs


def test_magnitudes_below_the_grid_are_not_sent_larger_than_they_are():
    tiny = {name: torch.full(shape, 1e-30) for name, shape in SHAPES.items()}
    assert get_codec("sampled").encode(tiny, context=CodecContext(round=1)).payload == b""
