"""The moving budget: small while progress is fast, large when it slows, never out of its bounds."""

import itertools
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedfstq_hf.codec.budget import BudgetController, BudgetState, parse_controller
from fedfstq_hf.errors import BudgetError

CONTROLLER = BudgetController(low=1000, high=8000)


def run(signals, controller=CONTROLLER, state=None):
    state, budgets = state or controller.start(), []
    for round, signal in enumerate(signals, start=1):
        state = controller.after(state, signal, round)
        budgets.append(state.num_bytes)
    return budgets


def test_steady_progress_stays_cheap():
    assert run([10 - 0.5 * t for t in range(20)])[3:] == [1000] * 17


def test_a_plateau_is_met_with_all_there_is():
    budgets = run([3 + math.exp(-t / 3) for t in range(30)])
    assert budgets[2] == 1000
    assert budgets[-1] == 8000
    assert all(b <= 1.5 * a + 1 for a, b in itertools.pairwise(budgets))


def test_new_progress_brings_the_budget_down():
    budgets = run([3.0] * 10 + [3 - 0.2 * t for t in range(12)])
    assert budgets[9] == 8000
    assert budgets[-1] < 2000


def test_one_step_by_hand():
    # level 4 -> 4 + 0.5 (2 - 4) = 3: progress 1, the fastest so far, so the budget shrinks: 3000 / 1.5
    state = CONTROLLER.after(BudgetState(3000, level=4.0, fastest=0.5, round=1), 2.0, 2)
    assert state == BudgetState(2000, level=3.0, fastest=1.0, round=2)
    # two rounds later: progress (3 - 2.8) / 2 = 0.1, less than half of 0.98^2: 2000 * 1.5
    assert CONTROLLER.after(state, 2.6, 4) == BudgetState(3000, pytest.approx(2.8), pytest.approx(0.98**2), 4)


def test_useless_signals_change_nothing():
    state = BudgetState(3000, level=4.0, fastest=0.5, round=5)
    for signal, round in ((math.nan, 6), (math.inf, 6), (2.0, 5), (2.0, 3)):
        assert CONTROLLER.after(state, signal, round) == state


@given(st.lists(st.floats(-1e6, 1e6), max_size=30), st.integers(1, 10**6))
def test_bounds_hold(signals, num_bytes):
    assert all(1000 <= b <= 8000 for b in run(signals, state=BudgetState(num_bytes)))


def test_the_state_survives_json():
    state = CONTROLLER.after(CONTROLLER.after(CONTROLLER.start(), 4.0, 1), 3.5, 2)
    assert BudgetState(**json.loads(json.dumps(state.to_dict()))) == state


def test_parsing():
    assert parse_controller("auto", 80_000) == BudgetController(500, 4000)
    assert parse_controller("auto:2kB..5s@2Mbps", 1) == BudgetController(2000, 1_250_000)
    assert parse_controller("96kB", 1) is None
    assert parse_controller(1000, 1) is None
    assert parse_controller(None, 1) is None


@pytest.mark.parametrize("bad", ["auto:", "auto:1kB", "auto:..", "auto:5kB..1kB", "automatic", "auto:x..1kB"])
def test_bad_bounds_say_what_to_type(bad):
    with pytest.raises(BudgetError, match='"'):
        parse_controller(bad, 1000)
