"""Sizes of a client's messages: fixed, ramped, and moved by how training goes."""

from dataclasses import replace

import pytest
import torch

from fedfstq_hf.codec.budget import MessageBudget, open_budget
from fedfstq_hf.errors import BudgetError
from fedfstq_hf.federation.mailbox.posted_metrics import posted_losses
from fedfstq_hf.federation.record import AcceptedUpdate, RoundRecord, expected_messages

PARAMS = 80_000


def sizes(budget, losses, carried=None):
    carried, taken = dict(carried or {}), []
    for round, loss in enumerate(losses):
        size, moved = budget.take(round, len(losses), loss=loss, carried=carried)
        carried |= moved
        taken.append(size)
    return taken, carried


def test_fixed_and_unlimited_budgets_never_move_and_carry_nothing():
    assert sizes(open_budget("0.3bpp", PARAMS), [3.0, 2.0, 1.0]) == ([3000] * 3, {})
    assert sizes(open_budget(None, PARAMS), [3.0, 2.0]) == ([None, None], {})
    assert open_budget("5s@2Mbps", PARAMS).least() == 1_250_000
    assert open_budget(None, PARAMS).least() is None


def test_a_ramp_grows_by_one_factor_from_its_lower_to_its_upper_bound():
    taken, carried = sizes(open_budget("ramp:100B..1600B", PARAMS), [1.0] * 5)
    assert taken == [100, 200, 400, 800, 1600]
    assert carried == {}
    assert sizes(open_budget("ramp:100B..1600B", PARAMS), [1.0])[0] == [1600]


@pytest.mark.parametrize(("rounds", "late"), [(12, 3), (10, 3), (5, 2), (4, 1), (3, 1), (2, 1), (1, 1)])
def test_a_late_budget_is_its_upper_bound_in_the_last_quarter_of_the_rounds(rounds, late):
    taken, carried = sizes(open_budget("late:100B..1600B", PARAMS), [1.0] * rounds)
    assert taken == [100] * (rounds - late) + [1600] * late
    assert carried == {}


def test_auto_grows_when_the_local_loss_stops_falling_and_stays_within_its_bounds():
    budget = open_budget("auto:1kB..4kB", PARAMS)
    falling = [4.0, 3.0, 2.0]
    taken, carried = sizes(budget, [*falling, *[2.0] * 8])
    assert taken[:2] == [1000, 1000]
    assert taken[-1] == 4000
    assert sorted(taken[3:]) == taken[3:]
    assert set(carried) == {"budget"}


def test_auto_goes_on_from_what_the_session_carries():
    budget = open_budget("auto:1kB..4kB", PARAMS)
    losses = [4.0, 3.0, 2.0, 2.0, 2.0, 2.0]
    whole, _ = sizes(budget, losses)
    first, carried = sizes(budget, losses[:3])
    second = []
    for round in range(3, 6):
        size, moved = budget.take(round, 6, loss=losses[round], carried=carried)
        carried |= {name: value.clone() for name, value in moved.items()}
        second.append(size)
    assert first + second == whole
    assert carried["budget"].dtype == torch.float64


def test_posted_losses_go_before_the_clients_own():
    budget = open_budget("auto:1kB..4kB", PARAMS)
    posted = [(0, 4.0), (1, 3.0), *((round, 3.0) for round in range(2, 9))]
    size, moved = budget.take(9, 10, loss=0.1, posted=posted, carried={})
    assert (size, moved) == (4000, {})
    early, _ = budget.take(1, 10, loss=0.1, posted=posted[:2], carried={})
    assert early == 1000


def test_posted_losses_are_means_over_sources_and_skip_what_is_no_number():
    metrics = {3: {"a": {"eval_loss": 1.0}, "b": {"eval_loss": 3.0}}, 1: {"a": {"exact_match": 0.5}}}
    metrics[2] = {"a": {"eval_loss": "low"}, "b": {"eval_loss": 5}}
    assert posted_losses(metrics) == [(2, 5.0), (3, 2.0)]


@pytest.mark.parametrize(
    "budget", ["ramp", "ramp:1kB", "ramp:2kB..1kB", "late", "late:2kB..1kB", "auto:1kB", "ramp:x..1kB", "autobahn"]
)
def test_what_cannot_be_read_is_refused_with_an_example(budget):
    with pytest.raises(BudgetError, match=r"write|expected"):
        open_budget(budget, PARAMS)


def test_the_least_size_is_what_a_session_must_be_able_to_send():
    assert open_budget("ramp:100B..1600B", PARAMS).least() == 100
    assert open_budget("late:100B..1600B", PARAMS).least() == 100
    assert open_budget("auto:1kB..4kB", PARAMS).least() == 1000
    assert MessageBudget(fixed=7).least() == 7


@pytest.mark.parametrize("messages", [1, 3, 10])
@pytest.mark.parametrize("form", ["1bpp", "10kB", "ramp:100B..1600B", "late:100B..1600B", "auto:1kB..4kB"])
def test_a_rounds_budget_is_shared_by_the_messages_that_it_will_have(form, messages):
    alone, shared = open_budget(form, PARAMS), open_budget(f"round:{form}", PARAMS)
    carried, its_carried = {}, {}
    for round in range(6):
        size, carried = alone.take(round, 6, loss=1.0, messages=messages, carried=carried)
        share, its_carried = shared.take(round, 6, loss=1.0, messages=messages, carried=its_carried)
        assert share == size // messages
    assert shared.least(messages) == alone.least(messages) // messages


def test_a_share_is_never_less_than_a_byte_and_no_limit_stays_none():
    assert open_budget("round:5B", PARAMS).take(0, 1, messages=10, carried={}) == (1, {})
    assert MessageBudget(shared=True).take(0, 1, messages=10, carried={}) == (None, {})


@pytest.mark.parametrize(
    "budget", ["round:", "round", "round:round:1bpp", "round:ramp", "round:0.1", "late:round:1B..2B"]
)
def test_a_rounds_budget_that_cannot_be_read_is_refused(budget):
    with pytest.raises(BudgetError, match=r"write|expected"):
        open_budget(budget, PARAMS)


def test_as_many_messages_are_expected_as_the_last_round_took_in():
    update = AcceptedUpdate("a", "", 1, 1, 1.0, 1.0)
    first = RoundRecord(0, "", "", 0, "", 0.0, None, False)
    assert expected_messages(first, first=10) == 10
    assert expected_messages(replace(first, round=3, accepted=(update,) * 4), first=10) == 4
