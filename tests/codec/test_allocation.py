"""Ranking and budget search."""

import numpy as np
import pytest
import torch

from fedfstq_hf.codec import SparseUpdate
from fedfstq_hf.codec.coding.allocation import Draft, fill, largest_fitting, root_weight, strongest
from fedfstq_hf.errors import BudgetError


def test_strongest_orders_and_breaks_ties_by_index():
    score = np.array([1.0, 3.0, 0.0, 3.0, 1.0, 2.0, 1.0])
    assert strongest(score, 4).tolist() == [1, 3, 5, 0]
    assert strongest(score, 100).tolist() == [1, 3, 5, 0, 4, 6]  # zeros are never worth sending
    assert strongest(score, 0).tolist() == []
    assert strongest(-score, 3).tolist() == []


def test_root_weight_does_not_underflow_and_floors_unseen_coordinates():
    root = root_weight(torch.ones(3), torch.tensor([1e-30, 4e-30, 0.0]))
    assert root[:2].tolist() == pytest.approx([1e-15, 2e-15])
    assert 0 < root[2] < 1e-20
    assert root_weight(torch.ones(2), torch.zeros(2)).tolist() == [1.0, 1.0]
    assert root_weight(torch.ones(2), None).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("guess", [0, 1, 40, 100, 500])
@pytest.mark.parametrize("limit", [0, 1, 50, 99, 100, 1000])
def test_largest_fitting_is_exact_without_tolerance(limit, guess):
    sizes = np.sort(np.random.default_rng(0).integers(0, 200, 101))
    sizes[0] = 0
    expected = max([k for k in range(101) if sizes[k] <= limit], default=0)
    assert largest_fitting(lambda k: sizes[k], 100, limit, 0.0, guess) == expected


def test_largest_fitting_needs_few_evaluations_of_a_smooth_size():
    calls = []

    def size_of(count):
        calls.append(count)
        return 12.0 * count**0.9

    assert largest_fitting(size_of, 1_000_000, 50_000.0, 0.003, 9_000) == pytest.approx(
        (50_000 / 12) ** (1 / 0.9), rel=0.003
    )
    assert len(calls) <= 8


def draft_of(size_of):
    return lambda k: Draft(bytes(size_of(k)), SparseUpdate(1, None, torch.full((1,), float(k))))


@pytest.mark.parametrize("bias", [0.5, 0.8, 1.0, 1.3, 3.0])
def test_fill_meets_the_budget_whatever_the_estimate_says(bias):
    def size_of(count):
        return int(count**0.9)

    for budget in (10, 100, 1000):
        best = fill(draft_of(size_of), lambda k: bias * 8 * size_of(k), 100_000, budget)
        assert 0.97 * budget - 1 <= len(best.payload) <= budget


def test_fill_takes_everything_if_it_fits():
    assert float(fill(draft_of(lambda k: k), lambda k: 8 * k, 50, 1000).update.values) == 50


def test_fill_refuses_a_budget_below_an_empty_update():
    with pytest.raises(BudgetError, match="at least 3 bytes"):
        fill(draft_of(lambda k: 5 + k), lambda k: 8 * k, 50, 2)
