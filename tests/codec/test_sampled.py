"""sampled: the sample is the message's own, signs keep an update's length, and their mean over clients is unbiased."""

import numpy as np
import pytest
import torch

from fedfstq_hf.codec import CodecContext, Schema, get_codec
from fedfstq_hf.codec.sampled import ticket
from tests.codec.conftest import make_update

SHAPES = {"0.lora_A": (8, 512), "0.lora_B": (512, 8), "1.lora_A": (8, 512), "1.lora_B": (512, 8)}
DELTA = make_update(SHAPES)[0]
VECTOR = Schema.from_state_dict(DELTA).flatten(DELTA)


def sent(bits=0.1, delta=DELTA, seed=0, **more):
    return get_codec("sampled", bits=bits, seed=seed).encode(delta, **more).reconstruction.to_dense()


def test_tickets_are_what_the_specification_says():
    def by_hand(seed, i):
        h = i ^ seed
        h = (h ^ h >> 16) * 0x85EBCA6B & 0xFFFFFFFF
        h = (h ^ h >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
        return (h ^ h >> 16) >> 16

    for seed in (0, 1, 0xDEADBEEF, 0xFFFFFFFF):
        assert ticket(seed, 70_000, 70_040).tolist() == [by_hand(seed, i) for i in range(70_000, 70_040)]


def test_tickets_are_spread_evenly_and_differ_by_seed():
    counts = np.bincount(ticket(3, 0, 1 << 20) >> 12, minlength=16)
    assert abs(counts / 65536 - 1).max() < 0.02
    both = (ticket(3, 0, 1 << 20) < 6554) & (ticket(4, 0, 1 << 20) < 6554)
    assert both.mean() == pytest.approx(0.01, rel=0.1)


def test_the_sample_is_of_the_share_asked_for_and_holds_signs():
    dense = sent(0.25)
    chosen = dense != 0
    assert chosen.double().mean() == pytest.approx(0.25, abs=0.02)
    assert torch.equal(dense[chosen].sign(), VECTOR[chosen].sign())
    for spec in Schema.from_state_dict(DELTA).tensors:
        assert len(set(dense[spec.offset :][: spec.size].abs().tolist()) - {0.0}) == 1


def test_all_signs_have_the_length_of_the_update_in_its_direction():
    # |x|_2^2 / |x|_1 per tensor, within the half step of the grid of magnitudes
    assert float(sent(1.0) @ VECTOR / (VECTOR @ VECTOR)) == pytest.approx(1.0, abs=0.05)


def test_the_mean_over_clients_comes_close_to_what_all_signs_say():
    clients = 400
    mean = torch.stack([sent(0.1, seed=seed) for seed in range(clients)]).mean(0)
    every = sent(1.0)
    assert torch.linalg.vector_norm(mean - every) / torch.linalg.vector_norm(every) == pytest.approx(
        (9 / clients) ** 0.5, rel=0.1
    )


def test_an_update_of_zeros_is_an_empty_message_and_a_tensor_of_zeros_takes_no_signs():
    zeros = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    assert get_codec("sampled").encode(zeros).payload == b""
    one = {**zeros, "1.lora_B": DELTA["1.lora_B"]}
    payload = get_codec("sampled").encode(one, max_bytes=100).payload
    dense = get_codec("sampled").decode(payload, Schema.from_state_dict(one)).to_dense()
    assert not dense[: 3 * 4096].any()
    assert 650 < int((dense != 0).sum()) < 800  # 100 bytes, 90 of them signs


def test_magnitudes_below_the_grid_are_not_sent_larger_than_they_are():
    tiny = {name: torch.full(shape, 1e-30) for name, shape in SHAPES.items()}
    assert get_codec("sampled").encode(tiny, context=CodecContext(round=1)).payload == b""
