"""Which positions are kept: hand-made scores."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfstq_hf.errors import ConfigError, NonFiniteError
from fedfstq_hf.generation.selection import budgets, check_spans, select


def test_highest_scores_are_kept_in_order():
    scores = torch.tensor([[0.1, 0.9, 0.3, 0.8, 0.2]])
    none = torch.zeros(1, 5, dtype=torch.bool)
    assert select(scores, torch.ones(1, 5), none, torch.tensor([2])).positions.tolist() == [[1, 3]]
    protected = torch.tensor([[True, False, False, False, True]])
    assert select(scores, torch.ones(1, 5), protected, torch.tensor([3])).positions.tolist() == [[0, 1, 4]]
    assert select(scores, torch.ones(1, 5), protected, torch.tensor([1])).positions.tolist() == [[0, 4]]


def test_ties_go_to_the_earlier_token_and_infinity_is_below_protection():
    scores = torch.tensor([[torch.inf, 1.0, 1.0, torch.inf]])
    protected = torch.tensor([[False, False, True, False]])
    assert select(scores, torch.ones(1, 4), protected, torch.tensor([2])).positions.tolist() == [[0, 2]]
    assert select(torch.zeros(1, 4), torch.ones(1, 4), protected & False, torch.tensor([2])).positions.tolist() == [
        [0, 1]
    ]


def test_rows_with_fewer_tokens_are_filled_with_their_padding():
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]])
    scores = torch.tensor([[6.0, 5, 4, 3, 2, 1], [9.0, 9, 9, 1, 2, 3]])
    kept = select(scores, mask, torch.zeros(2, 6, dtype=torch.bool), torch.tensor([3, 2])).positions
    assert kept[0].tolist() == [0, 1, 2]
    assert kept[1, 1:].tolist() == [4, 5]
    assert mask.gather(1, kept)[1].tolist() == [0, 1, 1]


def test_rows_without_padding_are_filled_with_their_next_best():
    protected = torch.tensor([[True, True, True, False], [False] * 4])
    kept = select(
        torch.tensor([[0.0] * 4, [1.0, 4, 2, 3]]), torch.ones(2, 4), protected, torch.tensor([2, 2])
    ).positions
    assert kept.tolist() == [[0, 1, 2], [1, 2, 3]]


def test_only_tokens_count_towards_a_budget():
    """Neither protection of padding nor a budget beyond the row's tokens makes a row keep more."""
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    scores = torch.tensor([[9.0, 9, 1, 3, 2]])
    padding = torch.tensor([[True, True, False, False, False]])
    assert select(scores, mask, padding, torch.tensor([1])).positions.tolist() == [[3]]
    assert select(scores, mask, padding & False, torch.tensor([5])).positions.tolist() == [[2, 3, 4]]


def test_nan_is_refused_unless_it_is_padding():
    scores = torch.tensor([[torch.nan, 1.0, 2.0]])
    none = torch.zeros(1, 3, dtype=torch.bool)
    with pytest.raises(NonFiniteError, match="NaN"):
        select(scores, torch.ones(1, 3), none, torch.tensor([2]))
    assert select(scores, torch.tensor([[0, 1, 1]]), none, torch.tensor([1])).positions.tolist() == [[2]]


def test_budgets():
    mask = torch.tensor([[1] * 30, [0] * 23 + [1] * 7])
    assert budgets(mask, 0.1, None).tolist() == [3, 1]
    assert budgets(mask, 0.5, None).tolist() == [15, 4]
    assert budgets(mask, 1.0, None).tolist() == [30, 7]
    assert budgets(mask, None, 12).tolist() == [12, 7]


def test_budgets_are_those_of_the_decimal_ratio():
    """0.07 x 100 is 7.000000000000001 in floating point, and 7 tokens for whoever wrote 0.07."""
    mask = torch.ones(1, 100)
    assert 0.07 * 100 > 7
    assert [budgets(mask, ratio, None).item() for ratio in (0.07, 0.0701, 0.55, 0.001)] == [7, 8, 55, 1]


def test_spans_beyond_the_budget_name_the_row():
    always = torch.tensor([[True, False, False, True]] * 2)
    spans = torch.tensor([[False] * 4, [False, True, True, False]])
    with pytest.raises(ConfigError, match=r"need 4 tokens in row 1, the budget is 3"):
        check_spans(spans, always, torch.tensor([1, 3]))
    check_spans(spans, always, torch.tensor([1, 4]))


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_batch_keeps_what_it_must(data):
    rows, length = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 12))
    lengths = [data.draw(st.integers(1, length)) for _ in range(rows)]
    mask = torch.tensor([[0] * (length - n) + [1] * n for n in lengths])
    flags = st.lists(st.booleans(), min_size=length, max_size=length)
    protected = torch.tensor([data.draw(flags) for _ in range(rows)])
    scores = torch.tensor(
        [data.draw(st.lists(st.floats(-5, 5), min_size=length, max_size=length)) for _ in range(rows)]
    )
    budget = torch.tensor([data.draw(st.integers(1, n)) for n in lengths])
    kept = select(scores, mask, protected, budget).positions
    flag = torch.zeros_like(mask).scatter(1, kept, 1).bool()
    assert (kept.diff(dim=1) > 0).all()
    assert (flag | ~(protected & mask.bool())).all()
    real = (flag & mask.bool()).sum(-1)
    assert (real >= torch.minimum(budget, mask.sum(-1))).all()
