"""fstq: fills any budget, keeps an update's length, errs as its code does, and is right in the mean over clients."""

import pytest
import torch

from fedfstq_hf.codec import CodecContext, Schema, get_codec
from fedfstq_hf.codec.coding.entropy import Adaptive, Writer, uniform
from fedfstq_hf.errors import ConfigError, MessageError, NonFiniteError
from tests.codec.conftest import make_update

SHAPES = {"0.lora_A": (8, 512), "0.lora_B": (512, 8), "1.lora_A": (8, 512), "1.lora_B": (512, 8)}
DELTA = make_update(SHAPES)[0]
SCHEMA = Schema.from_state_dict(DELTA)
VECTOR = SCHEMA.flatten(DELTA)


def sent(bits=0.1, delta=DELTA, seed=0, **more):
    return get_codec("fstq", bits=bits, seed=seed).encode(delta, **more).reconstruction.to_dense()


def test_a_tensor_has_one_magnitude():
    dense = sent()
    for spec in SCHEMA.tensors:
        assert len(set(dense[spec.offset :][: spec.size].abs().tolist())) == 1


@pytest.mark.parametrize("bits", [1.0, 0.6, 0.3, 0.1])
def test_a_message_has_the_length_of_the_update_in_its_direction(bits):
    # within the half step of the grid of magnitudes
    dense = sent(bits)
    assert float(dense @ VECTOR / (VECTOR @ VECTOR)) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize(("bits", "error"), [(0.1, 7.6), (0.25, 2.8), (0.5, 1.18)])
def test_the_error_is_that_of_its_code(bits, error):
    normal = {name: torch.randn(shape, generator=torch.Generator().manual_seed(1)) for name, shape in SHAPES.items()}
    vector = SCHEMA.flatten(normal)

    def mean_error():
        found = [float((sent(bits, normal, seed) - vector).square().sum()) for seed in range(10)]
        return sum(found) / len(found) / float(vector.square().sum())

    assert mean_error() == pytest.approx(error, rel=0.03)


def errors_of_the_mean(delta, clients):
    """Relative error of the mean of so many messages, and its length along the update, tensor by tensor."""
    vector = SCHEMA.flatten(delta)
    mean = torch.stack([sent(0.1, delta, seed) for seed in range(clients)]).mean(0)
    for spec in SCHEMA.tensors:
        found, exact = (x[spec.offset :][: spec.size] for x in (mean, vector))
        yield float((found - exact).norm() / exact.norm()), float(found @ exact / (exact @ exact))


def test_the_mean_over_clients_comes_close_to_the_update_in_every_tensor():
    clients = 150
    alone = float((sent(0.1) - VECTOR).norm() / VECTOR.norm())
    for error, length in errors_of_the_mean(DELTA, clients):
        assert error == pytest.approx(alone / clients**0.5, rel=0.3)
        assert length == pytest.approx(1.0, abs=0.05)


def test_a_tensor_whose_length_is_in_few_coordinates_is_flattened_by_a_tenth():
    one_row = {name: tensor.clone() for name, tensor in DELTA.items()}
    one_row["0.lora_A"][1:] = 0  # all of the tensor's length in an eighth of its coordinates
    _, length = next(errors_of_the_mean(one_row, 150))
    assert 0.89 < length < 1.02  # one magnitude says the larger ones less than in full, in every message alike


def test_a_budget_is_filled_to_the_byte_or_nearly_and_what_is_read_is_what_was_written():
    for size in range(20, 2048, 53):
        encoded = get_codec("fstq").encode(DELTA, max_bytes=size)
        assert size - max(2, 0.01 * size) <= len(encoded.payload) <= size
        decoded = get_codec("fstq").decode(encoded.payload, SCHEMA)
        assert torch.equal(decoded.to_dense(), encoded.reconstruction.to_dense())


def test_more_than_a_bit_for_each_coordinate_is_not_used():
    room = len(get_codec("fstq").encode(DELTA, max_bytes=100_000).payload)
    assert SCHEMA.num_params / 8 < room < SCHEMA.num_params / 8 + 30


def test_what_is_too_little_for_any_step_is_an_empty_message():
    assert get_codec("fstq").encode(DELTA, max_bytes=8).payload == b""


def test_an_update_of_zeros_is_an_empty_message_and_a_tensor_of_zeros_takes_no_signs():
    zeros = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    assert get_codec("fstq").encode(zeros).payload == b""
    one = {**zeros, "1.lora_B": DELTA["1.lora_B"]}
    payload = get_codec("fstq").encode(one, max_bytes=100).payload
    dense = get_codec("fstq").decode(payload, SCHEMA).to_dense()
    assert not dense[: 3 * 4096].any()
    assert bool((dense[3 * 4096 :] != 0).all())


def test_magnitudes_below_the_grid_are_not_sent_larger_than_they_are():
    tiny = {name: torch.full(shape, 1e-30) for name, shape in SHAPES.items()}
    assert get_codec("fstq").encode(tiny, context=CodecContext(round=1)).payload == b""


@pytest.mark.parametrize("steps", [0, 4097, 2**32 - 1])
def test_a_number_of_steps_that_cannot_be_is_refused(steps):
    writer = Writer()
    writer.put([0, 0, 0, 0, *steps.to_bytes(4, "big")], uniform(256))
    writer.put_adaptive([0, 500, 0, 0], Adaptive(1025))
    with pytest.raises(MessageError, match=f"{steps} steps for 4096 coordinates"):
        get_codec("fstq").decode(writer.finish(), SCHEMA)


# Tensors that count by their Fisher information

SENSITIVE = {name: torch.full(shape, 256.0 if name == "0.lora_B" else 1.0) for name, shape in SHAPES.items()}


def weighted(fisher, bits=0.1, delta=DELTA, seed=0, **more):
    codec = get_codec("fstq", bits=bits, seed=seed)
    return codec.encode(delta, fisher, **more)


def of_one_size():
    """An update whose tensors have one size, so that Fisher information alone is what they count by."""
    normal = {name: torch.randn(shape, generator=torch.Generator().manual_seed(2)) for name, shape in SHAPES.items()}
    return {name: tensor / tensor.square().mean().sqrt() for name, tensor in normal.items()}


def test_what_is_sensitive_errs_less_and_the_fisher_weighted_error_is_smaller():
    update = of_one_size()
    vector, fisher = SCHEMA.flatten(update), SCHEMA.flatten(SENSITIVE)
    sensitive = fisher > 1

    def errors(given):
        found = [weighted(given, delta=update, seed=seed).reconstruction.to_dense() for seed in range(10)]
        return torch.stack([(dense - vector).square() for dense in found]).mean(0)

    blind, seen = errors(None), errors(SENSITIVE)
    # squared weights 16 and 1 where all alike have their mean, 4.75, and the error of few bits falls as one over them;
    # where a step says some ten signs the light ones fit a little better than by their weight
    assert float(blind[sensitive].sum() / seen[sensitive].sum()) == pytest.approx(16 / 4.75, rel=0.15)
    assert 2.5 < float(seen[~sensitive].sum() / blind[~sensitive].sum()) < 4.75
    assert float((fisher * seen).sum() / (fisher * blind).sum()) < 0.4


def test_the_mean_of_many_messages_is_right_whatever_tensors_count():
    mean = torch.stack([weighted(SENSITIVE, seed=seed).reconstruction.to_dense() for seed in range(150)]).mean(0)
    for spec in SCHEMA.tensors:
        found, exact = (x[spec.offset :][: spec.size] for x in (mean, VECTOR))
        assert float(found @ exact / (exact @ exact)) == pytest.approx(1.0, abs=0.08)


@pytest.mark.parametrize("fisher", [None, {name: torch.zeros(shape) for name, shape in SHAPES.items()}])
def test_without_fisher_information_all_tensors_count_alike(fisher):
    assert weighted(fisher, max_bytes=400).payload == get_codec("fstq").encode(DELTA, max_bytes=400).payload


def test_equal_information_about_tensors_of_one_size_is_no_information():
    update = of_one_size()
    flat = {name: torch.full(shape, 3e-7) for name, shape in SHAPES.items()}
    alike = get_codec("fstq").encode(update, max_bytes=400).reconstruction.to_dense()
    found = weighted(flat, delta=update, max_bytes=400).reconstruction.to_dense()
    assert float((found != alike).float().mean()) < 0.01


def test_no_tensor_is_left_out_however_little_depends_on_it():
    fisher = {name: torch.full(shape, 1.0 if name == "1.lora_A" else 1e-30) for name, shape in SHAPES.items()}
    dense = weighted(fisher, bits=0.5).reconstruction.to_dense()
    for spec in SCHEMA.tensors:
        found, exact = (x[spec.offset :][: spec.size] for x in (dense, VECTOR))
        assert float(found @ exact / (exact @ exact)) == pytest.approx(1.0, abs=0.25)


def test_a_decoder_needs_to_know_nothing_of_it():
    for size in (60, 400, 1500):
        encoded = weighted(SENSITIVE, max_bytes=size)
        assert size - max(2, 0.01 * size) <= len(encoded.payload) <= size
        decoded = get_codec("fstq").decode(encoded.payload, SCHEMA)
        assert torch.equal(decoded.to_dense(), encoded.reconstruction.to_dense())


def test_what_is_no_switch_and_what_is_no_fisher_information_is_refused():
    with pytest.raises(ConfigError, match="fstq fisher_weighted is 1; expected true or false"):
        get_codec("fstq", fisher_weighted=1)
    with pytest.raises(NonFiniteError, match=r"Fisher information of tensor '0\.lora_A'"):
        weighted({**SENSITIVE, "0.lora_A": torch.full(SHAPES["0.lora_A"], float("nan"))})
