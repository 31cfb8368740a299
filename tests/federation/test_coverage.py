"""Turns: which tensors whose message covers, the mean over those that cover, and residuals that do not come twice."""

import hashlib

import pytest
import torch

from fedfstq_hf.codec import Schema, SparseUpdate
from fedfstq_hf.errors import ConfigError
from fedfstq_hf.federation.server.aggregation import WeightedMean
from fedfstq_hf.federation.turns import turn_of
from fedfstq_hf.switches import check_coverage

STATE = {f"layer.{i}.{which}": torch.zeros(2 + i, 3) for i in range(5) for which in ("a", "b")}
SCHEMA = Schema.from_state_dict(STATE)


def names(turn):
    return {spec.name for spec in turn.schema.tensors}


def turn(coverage=0.3, client="anna", round=4, seed=7):
    return turn_of(SCHEMA, coverage, seed=seed, client_id=client, round=round)


@pytest.mark.parametrize(("coverage", "count"), [(0.01, 1), (0.3, 3), (0.5, 5), (0.96, 10), (1.0, 10)])
def test_a_share_of_the_tensors_and_at_least_one(coverage, count):
    assert len(names(turn(coverage))) == count
    assert turn(coverage).everything == (count == 10)


def test_it_follows_from_seed_round_and_client_and_from_nothing_else():
    assert names(turn()) == names(turn())
    for others in ([{"client": f"c{i}"} for i in range(5)], [{"round": i} for i in range(5)], [{"seed": 8}]):
        assert any(names(turn(**other)) != names(turn()) for other in others)


def test_it_is_what_the_specification_says():
    def u(text):
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64

    count = len(SCHEMA.tensors)
    order = sorted(range(count), key=lambda i: u(f"tensor 7 4 {i}"))
    start = int(u("client 7 4 anna") * count)
    expected = {SCHEMA.tensors[order[(start + i) % count]].name for i in range(3)}
    assert names(turn()) == expected


def test_over_rounds_and_clients_every_tensor_has_its_turn_about_equally_often():
    counts = dict.fromkeys(STATE, 0)
    for round in range(40):
        for client in range(10):
            for name in names(turn(client=f"client-{client:04d}", round=round)):
                counts[name] += 1
    assert sum(counts.values()) == 40 * 10 * 3
    assert min(counts.values()) > 80
    assert max(counts.values()) < 160


def test_take_and_put_are_inverse_where_it_covers():
    part, vector = turn(), torch.arange(1.0, SCHEMA.num_params + 1)
    back = part.put(part.take(vector))
    assert torch.equal(back != 0, part.covers())
    assert torch.equal(back[part.covers()], vector[part.covers()])
    sparse = SparseUpdate(part.schema.num_params, torch.tensor([0]), torch.tensor([5.0]))
    whole = part.put_update(sparse)
    assert whole.num_params == SCHEMA.num_params
    assert whole.to_dense().sum() == 5.0
    assert bool(part.covers()[whole.to_dense().nonzero()].all())


def test_the_mean_is_over_those_that_cover():
    mean = WeightedMean(3, parts=True)
    mean.add(SparseUpdate(3, None, torch.tensor([2.0, 4.0, 0.0])), 1.0, covers=torch.tensor([True, True, False]))
    mean.add(SparseUpdate(3, None, torch.tensor([8.0, 0.0, 0.0])), 2.0, covers=torch.tensor([True, False, False]))
    assert mean.result().tolist() == [6.0, 4.0, 0.0]
    whole = WeightedMean(3, parts=True)
    whole.add(SparseUpdate(3, None, torch.tensor([2.0, 4.0, 0.0])), 1.0)
    whole.add(SparseUpdate(3, None, torch.tensor([8.0, 1.0, 0.0])), 2.0, 0.5)
    plain = WeightedMean(3)
    plain.add(SparseUpdate(3, None, torch.tensor([2.0, 4.0, 0.0])), 1.0)
    plain.add(SparseUpdate(3, None, torch.tensor([8.0, 1.0, 0.0])), 2.0, 0.5)
    assert torch.equal(whole.result(), plain.result())


def test_bad_shares_are_refused():
    for coverage in (0, -0.1, 1.5, True, "half", float("nan")):
        with pytest.raises(ConfigError, match="coverage must be a share"):
            check_coverage(coverage, scaffold=False)
    with pytest.raises(ConfigError, match="cannot be combined"):
        check_coverage(0.5, scaffold=True)
