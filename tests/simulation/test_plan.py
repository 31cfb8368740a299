import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfstq_hf.errors import ConfigError
from fedfstq_hf.simulation.population import make_plan


@settings(max_examples=60, deadline=None)
@given(
    clients=st.integers(1, 40),
    share=st.floats(0.01, 1),
    rounds=st.integers(1, 12),
    dropout=st.floats(0, 0.99),
    seed=st.integers(0, 2**31),
)
def test_every_round_has_its_members_and_a_survivor(clients, share, rounds, dropout, seed):
    per_round = max(1, int(share * clients))
    plan = make_plan(clients, per_round, rounds, dropout, seed)
    assert [entry.round for entry in plan] == list(range(1, rounds + 1))
    for entry in plan:
        assert len(set(entry.sampled)) == per_round
        assert set(entry.sampled) <= set(range(clients))
        assert 1 <= len(entry.survivors) <= per_round
        assert set(entry.survivors) <= set(entry.sampled)
        assert list(entry.sampled) == sorted(entry.sampled)
        assert entry.num_dropped == per_round - len(entry.survivors)


def test_a_longer_run_begins_like_a_shorter_one():
    assert make_plan(20, 4, 30, 0.3, seed=5)[:12] == make_plan(20, 4, 12, 0.3, seed=5)


def test_dropout_never_changes_who_is_sampled():
    without, with_dropout = make_plan(20, 4, 12, 0.0, seed=5), make_plan(20, 4, 12, 0.7, seed=5)
    assert [entry.sampled for entry in without] == [entry.sampled for entry in with_dropout]
    assert all(entry.survivors == entry.sampled for entry in without)


def test_dropout_has_its_rate():
    plan = make_plan(100, 20, 500, 0.25, seed=0)
    assert sum(entry.num_dropped for entry in plan) / 10_000 == pytest.approx(0.25, abs=0.015)


def test_all_clients_get_their_turn():
    plan = make_plan(20, 4, 100, 0.0, seed=0)
    counts = [sum(client in entry.sampled for entry in plan) for client in range(20)]
    assert min(counts) > 5
    assert max(counts) < 40


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((5, 6, 1, 0.0), "clients_per_round"),
        ((5, 0, 1, 0.0), "clients_per_round"),
        ((5, 2, 0, 0.0), "rounds"),
        ((5, 2, 1, 1.0), "dropout"),
    ],
)
def test_impossible_plans_are_refused(arguments, named):
    with pytest.raises(ConfigError, match=named):
        make_plan(*arguments, seed=0)
