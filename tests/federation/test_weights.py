"""`precision_weights`: the minimum that it is said to be, and what it does to loud and silent messages."""

import numpy as np
import pytest

from fedfstq_hf.federation.server.collecting import precision_weights


def cost(weights, shares, norms):
    """What the docstring says is minimised, for weights that sum to 1."""
    noise = (np.asarray(norms) / np.median(norms)) ** 2
    wanted = np.asarray(shares) / np.sum(shares)
    return float(np.sum(weights**2 * noise) + np.sum((weights - wanted) ** 2))


def test_no_other_weights_cost_less():
    rng = np.random.default_rng(0)
    for _ in range(20):
        shares, norms = rng.lognormal(0, 1, 9), rng.lognormal(0, 1, 9)
        weights = np.array(precision_weights(shares.tolist(), norms.tolist()))
        assert weights.sum() == pytest.approx(1)
        assert (weights > 0).all()
        least = cost(weights, shares, norms)
        for size in (1e-1, 1e-2, 1e-3):
            step = rng.standard_normal(9) * size
            assert cost(weights + step - step.mean(), shares, norms) > least


def test_messages_of_equal_noise_weigh_half_by_examples_half_alike():
    assert precision_weights([1, 3], [2.0, 2.0]) == pytest.approx([0.375, 0.625])


def test_a_loud_message_of_many_examples_hardly_counts():
    weights = precision_weights([90, 5, 5], [100.0, 1.0, 1.0])
    assert weights[0] < 0.001
    assert weights[1] == pytest.approx(weights[2])


def test_a_message_that_says_nothing_weighs_nothing():
    """An empty message is not a precise one: with a weight of its own it would only shorten the mean."""
    with_it = precision_weights([50, 1, 3], [0.0, 2.0, 3.0])
    assert with_it[0] == 0
    assert with_it[1:] == pytest.approx(precision_weights([1, 3], [2.0, 3.0]))


def test_where_nobody_says_anything_examples_are_left():
    assert precision_weights([1, 3], [0.0, 0.0]) == pytest.approx([0.25, 0.75])


def test_weights_do_not_depend_on_the_units():
    first = precision_weights([1, 2, 3], [1.0, 2.0, 4.0])
    assert precision_weights([10, 20, 30], [1e-8, 2e-8, 4e-8]) == pytest.approx(first)
