"""Pairs, their balanced form and the measure of error, against direct computation."""

import pytest
import torch

from fedfstq_hf.sharing.calibration import PairWeights, even_weights, matrices
from fedfstq_hf.sharing.coding import balance, coordinate_weights, product_error
from fedfstq_hf.sharing.trained import Pair, find_pairs


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator).double()

    weights = PairWeights(draw(9).exp(), draw(7).exp(), 2.5)
    return draw(4, 7), draw(9, 4), weights, draw


def weighted(error, weights):
    return weights.scale * float((weights.output[:, None] * weights.input * error.square()).sum())


def test_balancing_keeps_the_product_and_makes_components_orthogonal(problem):
    a, b, weights, _ = problem
    new_a, new_b = balance(a, b, weights)
    torch.testing.assert_close(new_b @ new_a, b @ a)
    for gram in ((new_a * weights.input) @ new_a.T, (new_b * weights.output[:, None]).T @ new_b):
        torch.testing.assert_close(gram, gram.diag().diag())
        assert (gram.diag().diff() <= 0).all()


def test_a_rank_that_is_not_there_becomes_zeros(problem):
    a, b, weights, _ = problem
    a[3] = a[0]
    new_a, new_b = balance(a, b, weights)
    torch.testing.assert_close(new_b @ new_a, b @ a)
    assert new_a[3].abs().max() < 1e-6
    wide_a, wide_b = torch.randn(6, 3).double(), torch.randn(8, 6).double()
    even = PairWeights(torch.ones(8).double(), torch.ones(3).double(), 1.0)
    new_a, new_b = balance(wide_a, wide_b, even)
    torch.testing.assert_close(new_b @ new_a, wide_b @ wide_a)
    assert not new_a[3:].any()


def test_the_error_is_that_of_the_products(problem):
    a, b, weights, draw = problem
    other_a, other_b = a + 0.1 * draw(4, 7), b + 0.1 * draw(9, 4)
    expected = weighted(other_b @ other_a - b @ a, weights)
    assert product_error(a, b, other_a, other_b, weights) == pytest.approx(expected)
    assert product_error(a, b, a, b, weights) == pytest.approx(0, abs=1e-9)


def test_coordinate_weights_are_the_cost_of_a_small_error(problem):
    a, b, weights, _ = problem
    of_a, of_b = coordinate_weights(a, b, weights)
    moved = a.clone()
    moved[1, 2] += 1e-3
    assert product_error(a, b, moved, b, weights) == pytest.approx(1e-6 * float(of_a[1, 2]))
    moved = b.clone()
    moved[5, 3] += 1e-3
    assert product_error(a, b, a, moved, weights) == pytest.approx(1e-6 * float(of_b[5, 3]))


def test_pairs_are_found_by_name_and_shape():
    state = {
        "m.x.lora_A.weight": torch.zeros(2, 5),
        "m.x.lora_B.weight": torch.zeros(6, 2),
        "m.x.lora_magnitude_vector": torch.zeros(6),
        "m.conv.lora_A.weight": torch.zeros(2, 3, 3, 3),
        "m.conv.lora_B.weight": torch.zeros(4, 2, 1, 1),
        "m.emb.lora_embedding_A": torch.zeros(2, 11),
        "m.emb.lora_embedding_B": torch.zeros(8, 2),
        "m.odd.lora_A.weight": torch.zeros(2, 5),
        "m.odd.lora_B.weight": torch.zeros(6, 3),
        "m.alone.lora_A.weight": torch.zeros(2, 5),
    }
    pairs = find_pairs(state, {"m.x": 3.0})
    assert [pair.module for pair in pairs] == ["m.conv", "m.emb", "m.x"]
    assert pairs[2] == Pair("m.x", "m.x.lora_A.weight", "m.x.lora_B.weight", 3.0)
    a, b = matrices(state, pairs[0])
    assert (tuple(a.shape), tuple(b.shape)) == ((2, 27), (4, 2))
    assert even_weights(state, pairs[2]).scale == 9.0
