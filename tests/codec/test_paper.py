"""paper: the quantiser and the allocation, against numbers worked out by hand."""

import numpy as np
import pytest
import torch

from fedfstq_hf.codec import Schema, get_codec
from fedfstq_hf.codec.baselines.paper import dequantize, quantize
from tests.codec.conftest import make_update


@pytest.mark.parametrize(
    ("width", "expected", "values"),
    [
        (2, [0, -1, 1, 0, 0], [0.0, -2.0, 2.0, 0.0, 0.0]),  # q_max 1, scale 2
        (4, [1, -5, 7, 2, 0], [2 / 7, -10 / 7, 2.0, 4 / 7, 0.0]),  # q_max 7, scale 2/7
        (16, [3277, -22937, 32767, 8192, 0], [6554 / 32767, -45874 / 32767, 2.0, 16384 / 32767, 0.0]),  # q_max 32767
    ],
)
def test_quantiser(width, expected, values):
    given, largest = np.array([0.2, -1.4, 2.0, 0.5, 0.0]), np.full(5, 2.0)
    levels = quantize(given, largest, width)
    # the exact quotients are 0.7, -4.9, 7, 1.75 at 4 bit and 3276.7, -22936.9, 32767, 8191.75 at 16
    assert levels.tolist() == expected
    assert dequantize(levels, largest, width) == pytest.approx(values)


def test_an_all_zero_matrix_quantises_to_zero():
    assert quantize(np.zeros(2), np.zeros(2), 2).tolist() == [0, 0]


def test_allocation_follows_the_percentiles_of_fisher_times_delta_squared():
    # u = F * delta^2 = 9, 8, 1, 4, 0.25, 0: one at 16 bit, one at 4, two at 2, two not sent
    delta = {"a": torch.tensor([3.0, 2.0, -1.0, 4.0, 0.5, 0.0])}
    fisher = {"a": torch.tensor([1.0, 2.0, 1.0, 0.25, 1.0, 1.0])}
    codec = get_codec("paper", shares=(2 / 6, 1 / 6, 1 / 6))
    update = codec.encode(delta, fisher).reconstruction
    assert update.indices.tolist() == [0, 1, 2, 3]
    # scale 4: 3.0 at 16 bit, 2.0 -> round(3.5) = 4 of 7, -1.0 -> 0 and 4.0 -> 1 at 2 bit
    expected = [round(3 / 4 * 32767) * 4 / 32767, 4 * 4 / 7, 0.0, 4.0]
    assert update.values.tolist() == pytest.approx(expected)


def test_the_scale_is_the_maximum_of_the_whole_matrix_even_if_that_is_not_sent():
    delta = {"a": torch.tensor([100.0, 1.0])}
    fisher = {"a": torch.tensor([1e-9, 1.0])}
    update = get_codec("paper", shares=(0.0, 0.5, 0.0)).encode(delta, fisher).reconstruction
    assert (update.indices.tolist(), update.values.tolist()) == ([1], [0.0])


def test_shares_shrink_by_one_factor_to_meet_the_budget():
    delta, fisher = make_update()
    codec = get_codec("paper")
    update = codec.encode(delta, fisher, max_bytes=150).reconstruction
    full = codec.encode(delta, fisher)
    assert 0 < update.nnz < full.reconstruction.nnz
    # the 16-bit class is 1/15 of what is sent and reproduces its values almost exactly
    exact = Schema.from_state_dict(delta).flatten(delta)[update.indices]
    close = (update.values - exact).abs() <= 1e-4 * exact.abs()
    assert close.sum() == pytest.approx(update.nnz / 15, abs=2)
