from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfstq_hf.errors import ConfigError, DataError
from fedfstq_hf.simulation.population import dirichlet_partition, iid_partition, make_shards, natural_partition


@settings(max_examples=80, deadline=None)
@given(
    topics=st.lists(st.sampled_from("abcde"), min_size=1, max_size=120),
    clients=st.integers(1, 20),
    alpha=st.sampled_from([1e-4, 0.01, 0.1, 1.0, 100.0]),
    seed=st.integers(0, 2**31),
    min_size=st.integers(1, 4),
)
def test_dirichlet_gives_every_example_to_exactly_one_client(topics, clients, alpha, seed, min_size):
    if len(topics) < clients * min_size:
        with pytest.raises(DataError, match="training examples cannot give"):
            dirichlet_partition(topics, clients, alpha, seed, min_size)
        return
    shards = dirichlet_partition(topics, clients, alpha, seed, min_size)
    assert sorted(index for shard in shards for index in shard) == list(range(len(topics)))
    assert len(shards) == clients
    assert min(map(len, shards)) >= min_size
    assert shards == dirichlet_partition(topics, clients, alpha, seed, min_size)
    assert all(shard == sorted(shard) for shard in shards)


def _largest_topic_share(alpha: float) -> float:
    topics = [str(index % 8) for index in range(1600)]
    shards = dirichlet_partition(topics, 20, alpha, seed=1, min_size=5)
    shares = [max(Counter(topics[index] for index in shard).values()) / len(shard) for shard in shards]
    return sum(shares) / len(shares)


def test_small_alpha_is_skewed_and_large_alpha_is_even():
    assert _largest_topic_share(0.1) > 0.6
    assert _largest_topic_share(100.0) < 0.25


def test_seeds_differ():
    topics = ["a", "b"] * 50
    assert dirichlet_partition(topics, 5, 0.5, seed=0) != dirichlet_partition(topics, 5, 0.5, seed=1)


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_alpha_must_be_positive(alpha):
    with pytest.raises(ConfigError, match="alpha"):
        dirichlet_partition(["a"] * 10, 2, alpha, seed=0)


@given(num_examples=st.integers(1, 100), clients=st.integers(1, 20), seed=st.integers(0, 1000))
def test_iid_shards_differ_by_at_most_one(num_examples, clients, seed):
    if num_examples < clients:
        with pytest.raises(DataError, match="--clients"):
            iid_partition(num_examples, clients, seed)
        return
    shards = iid_partition(num_examples, clients, seed)
    assert sorted(index for shard in shards for index in shard) == list(range(num_examples))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


def test_natural_keeps_owners_together():
    owners = ["b", "a", "b", "c", "a", "b"]
    assert natural_partition(owners, 3) == [[1, 4], [0, 2, 5], [3]]
    # Two clients: the largest owner alone, the other two together.
    assert natural_partition(owners, 2) == [[0, 2, 5], [1, 3, 4]]
    with pytest.raises(DataError, match=r"name 3 owners.*--clients 3"):
        natural_partition(owners, 4)


def test_make_shards_follows_the_rule():
    examples = [{"topic": "xy"[index % 2], "client": "pq"[index // 5]} for index in range(10)]
    settings_ = {"alpha": 0.1, "seed": 0}
    assert make_shards(examples, 2, partition="natural", **settings_) == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert make_shards(examples, 2, partition="iid", **settings_) == iid_partition(10, 2, 0)
    topics = [example["topic"] for example in examples]
    assert make_shards(examples, 2, partition="dirichlet", **settings_) == dirichlet_partition(topics, 2, 0.1, 0)
    with pytest.raises(ConfigError, match="partition must be"):
        make_shards(examples, 2, partition="even", **settings_)


def test_natural_without_owners_says_what_to_type():
    with pytest.raises(DataError, match=r"--data\.client_column"):
        make_shards([{"topic": "x"}], 1, partition="natural", alpha=1.0, seed=0)


def test_a_short_shard_is_topped_up_from_the_largest():
    # With nearly all mass on one client, the others are given what they need and no more.
    shards = dirichlet_partition(["a"] * 30, 3, 1e-4, seed=0, min_size=4)
    assert sorted(map(len, shards)) == [4, 4, 22]


def test_min_size_zero_is_refused():
    with pytest.raises(ConfigError, match="empty shard"):
        iid_partition(10, 2, seed=0, min_size=0)
