"""The codec of dense values: what its grid gives, what the budget buys, and what malformed payloads do."""

import numpy as np
import pytest
import torch

from fedfstq_hf.codec import Schema, get_codec
from fedfstq_hf.codec.uniform.grid import Levels, Shape, read, step_grid, values_of, write
from fedfstq_hf.errors import FedFSTQError, MessageError, NonFiniteError


def gaussian(seed=0, scales=(1.0, 0.5, 0.25)):
    generator = torch.Generator().manual_seed(seed)
    return {
        f"m{i}.{name}": scale * torch.randn(shape, generator=generator)
        for i, scale in enumerate(scales)
        for name, shape in (("lora_A", (8, 96)), ("lora_B", (120, 8)))
    }


def relative_error(state, update, weights=None):
    schema = Schema.from_state_dict(state)
    values = schema.flatten(state).double()
    weight = torch.ones_like(values) if weights is None else schema.flatten(weights).double()
    return float((weight * (values - update.to_dense()).square()).sum() / (weight * values.square()).sum())


def test_values_are_magnitudes_times_steps_read_at_their_offsets():
    # two groups: steps 2^-3 (index (80 - 3) * 4) and a quarter octave above; magnitude 2 is read at 2 - 1/4
    shape = Shape(np.array([0, 2, 4]), np.array([16, 8, 16]))
    steps = np.array([308, 309])
    levels = Levels([np.array([[0, 1, -2], [2, 0, 0]])], [np.array([5, 5])], [steps], 0, {5: shape})
    expected = np.array([[0, 1, -1.75], [1.75 * 1.1892071, 0, 0]], dtype=np.float32) / 8
    np.testing.assert_allclose(values_of(levels, 0), expected, rtol=1e-6)
    again = read(write(levels), [(2, 3)])
    np.testing.assert_array_equal(again.magnitudes[0], levels.magnitudes[0])
    np.testing.assert_array_equal(again.steps[0], steps)
    assert again.fine == 0
    np.testing.assert_array_equal(values_of(again, 0), values_of(levels, 0))


def test_the_grid_has_four_steps_an_octave_and_fine_ones_between():
    assert step_grid(0)[320] == 1.0
    np.testing.assert_allclose(step_grid(0)[324] / step_grid(0)[320], 2.0)
    np.testing.assert_allclose(step_grid(15)[320:322], [2 ** (15 / 64), 2 ** (31 / 64)], rtol=1e-6)


@pytest.mark.parametrize("bits", [0.5, 1, 2, 4])
def test_the_budget_is_kept_and_used(bits):
    state = gaussian()
    schema = Schema.from_state_dict(state)
    room = int(bits * schema.num_params / 8)
    encoded = get_codec("uniform").encode(state, max_bytes=room)
    assert 0.97 * room <= len(encoded.payload) <= room
    decoded = get_codec("uniform").decode(encoded.payload, schema)
    assert torch.equal(decoded.to_dense(), encoded.reconstruction.to_dense())


def test_two_bits_come_within_two_decibels_of_the_gaussian_bound():
    state = gaussian(scales=(1.0, 1.0, 1.0))
    size = 2 * sum(tensor.numel() for tensor in state.values()) // 8
    update = get_codec("uniform").encode(state, max_bytes=size).reconstruction
    # the bound at 2 bits is 2^-4; entropy-coded scalar quantisation is 1.53 dB above, and tables and classes cost too
    assert relative_error(state, update) < 2**-4 * 10**0.2


def test_weights_move_error_to_where_it_costs_less():
    state = gaussian(scales=(1.0, 1.0))
    weights = {name: torch.full_like(tensor, 64.0 if "lora_A" in name else 1.0) for name, tensor in state.items()}
    size = 2 * sum(tensor.numel() for tensor in state.values()) // 8
    even = get_codec("uniform").encode(state, max_bytes=size).reconstruction
    weighed = get_codec("uniform").encode(state, weights, max_bytes=size).reconstruction
    assert relative_error(state, weighed, weights) < 0.6 * relative_error(state, even, weights)


def test_what_has_no_weight_gets_no_bits():
    state = gaussian()
    weights = {name: torch.ones_like(tensor) for name, tensor in state.items()}
    weights["m0.lora_A"][3] = 0.0
    update = get_codec("uniform").encode(state, weights, max_bytes=2000).reconstruction
    assert not Schema.from_state_dict(state).unflatten(update.to_dense())["m0.lora_A"][3].any()


def test_zeros_and_empty_budgets_are_empty_payloads():
    state = {"a": torch.zeros(4, 8), "b": torch.zeros(5)}
    assert get_codec("uniform").encode(state).payload == b""
    assert get_codec("uniform").encode(gaussian(), max_bytes=0).payload == b""
    assert not get_codec("uniform").decode(b"", Schema.from_state_dict(state)).to_dense().any()


@pytest.mark.parametrize("shape", [(1,), (7,), (1, 1), (3, 3), (2, 5, 3), (4, 2, 1, 1), (0,)])
def test_any_shape(shape):
    state = {"x": torch.randn(shape, generator=torch.Generator().manual_seed(1)), "y": torch.ones(6, 2)}
    schema = Schema.from_state_dict(state)
    encoded = get_codec("uniform").encode(state, max_bytes=400)
    assert torch.equal(
        get_codec("uniform").decode(encoded.payload, schema).to_dense(), encoded.reconstruction.to_dense()
    )
    assert relative_error(state, encoded.reconstruction) < 0.01


def test_an_outlier_is_not_cut_off():
    state = {"x": torch.full((4, 64), 1e-3)}
    state["x"][1, 5] = 1e3
    update = get_codec("uniform").encode(state, max_bytes=100).reconstruction.to_dense().view(4, 64)
    assert update[1, 5] == pytest.approx(1e3, rel=0.02)


def test_nan_is_refused():
    with pytest.raises(NonFiniteError, match="'x'"):
        get_codec("uniform").encode({"x": torch.tensor([1.0, float("nan")])})


def test_damaged_payloads_are_refused_or_decode_to_finite_values():
    state = gaussian()
    schema = Schema.from_state_dict(state)
    payload = get_codec("uniform").encode(state, max_bytes=1500).payload
    rng = np.random.default_rng(0)
    refused = 0
    for trial in range(120):
        data = bytearray(payload)
        if trial % 3 == 0:
            data = data[: rng.integers(0, len(data))]
        else:
            for _ in range(rng.integers(1, 4)):
                data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        try:
            values = get_codec("uniform").decode(bytes(data), schema).to_dense()
        except MessageError:
            refused += 1
        except FedFSTQError as error:
            pytest.fail(f"{type(error).__name__}: {error}")
        else:
            assert torch.isfinite(values).all()
    assert refused > 100
    with pytest.raises(MessageError):
        get_codec("uniform").decode(payload + b"\1", schema)
