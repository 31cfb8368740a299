"""Token weights: masks by hand, probabilities by their definition, and the unbiased sample by exact enumeration."""

import itertools
import math

import pytest
import torch

from fedfstq_hf.errors import ConfigError
from fedfstq_hf.sensitivity import token_weights
from fedfstq_hf.sensitivity.objective import FLOOR, _systematic, keep_probabilities

INF = math.inf


def window(*rows):
    """Scores and valid mask of ragged rows; None stands for a position without target."""
    width = max(len(row) for row in rows)
    padded = [[*row, *[None] * (width - len(row))] for row in rows]
    valid = torch.tensor([[value is not None for value in row] for row in padded])
    return torch.tensor([[0.0 if value is None else float(value) for value in row] for row in padded]), valid


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def spread(count, seed=0):
    """Scores over six decades, some never seen."""
    scores = 10 ** (6 * torch.rand(count, generator=seeded(seed), dtype=torch.float64) - 3)
    scores[::17] = INF
    return scores


def test_full_weighs_all_targets_alike():
    scores, valid = window([3, None, 1], [None, 7])
    assert token_weights("full", scores, valid).tolist() == [[1, 0, 1], [0, 1, 0]]


def test_hard_keeps_the_most_sensitive_of_the_whole_window():
    scores, valid = window([3, None, 1, 9], [None, 7, 2])
    # 5 targets, half of them rounded up is 3: 9, 7 and 3; their mean is the loss, so each weighs 5 / 3 of a fifth
    expected = [[5 / 3, 0, 0, 5 / 3], [0, 5 / 3, 0, 0]]
    assert torch.allclose(token_weights("hard", scores, valid, ratio=0.5), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize(
    ("count", "ratio", "kept"), [(30, 0.1, 3), (7, 0.5, 4), (1, 0.01, 1), (4, 1.0, 4), (10, 0.3, 3), (100, 0.07, 7)]
)
def test_hard_keeps_the_ceiling(count, ratio, kept):
    scores, valid = window(list(range(count)))
    weights = token_weights("hard", scores, valid, ratio=ratio)
    assert int((weights > 0).sum()) == kept
    assert weights.sum().item() == pytest.approx(count)
    assert bool((weights[0, count - kept :] > 0).all())


def test_tokens_never_seen_come_first():
    scores, valid = window([1e9, INF, 5, INF])
    assert torch.nonzero(token_weights("hard", scores, valid, ratio=0.5)[0]).flatten().tolist() == [1, 3]
    soft = token_weights("soft", scores, valid)[0]
    assert soft[1] == soft[3] == soft[0] > soft[2]
    chance = keep_probabilities(scores[0], 0.5)
    assert chance[1] == chance[3] == chance[0] > chance[2]


def test_soft_weights_by_hand():
    scores, valid = window([4, 9, None], [25, 16])
    # roots 2, 3, 5, 4 with mean 3.5
    weights = token_weights("soft", scores, valid)
    assert weights[valid].tolist() == pytest.approx([2 / 3.5, 3 / 3.5, 5 / 3.5, 4 / 3.5])
    assert float(weights[0, 2]) == 0.0
    squared = token_weights("soft", scores, valid, gamma=1.0)
    assert squared[valid].tolist() == pytest.approx([4 / 13.5, 9 / 13.5, 25 / 13.5, 16 / 13.5])


@pytest.mark.parametrize("scores", [[0.0, 0.0, 0.0], [INF, INF, INF], [2.0, 2.0, 2.0]])
def test_without_differences_all_weigh_alike(scores):
    given, valid = window(scores)
    assert token_weights("soft", given, valid)[0].tolist() == [1.0, 1.0, 1.0]
    assert keep_probabilities(given[0], 0.5).tolist() == pytest.approx([0.5, 0.5, 0.5])


@pytest.mark.parametrize("ratio", [0.05, 0.3, 0.5, 0.9, 1.0])
def test_keep_probabilities(ratio):
    scores = spread(200)
    chance = keep_probabilities(scores, ratio)
    assert float(chance.sum()) == pytest.approx(ratio * 200, rel=1e-9)
    assert float(chance.min()) >= FLOOR * ratio
    assert float(chance.max()) <= 1.0
    ordered = chance[torch.argsort(scores)]
    assert bool((ordered.diff() >= 0).all())
    inner = (chance > FLOOR * ratio) & (chance < 1)
    if int(inner.sum()) > 1:  # between floor and 1 proportional to the root
        seen = scores.clamp_max(float(scores[scores < INF].max()))
        shares = chance[inner] / seen[inner].sqrt()
        assert float(shares.max() / shares.min()) == pytest.approx(1.0, rel=1e-9)


def test_scores_of_zero_do_not_starve_the_sum():
    scores = torch.zeros(100, dtype=torch.float64)
    scores[0] = 1.0
    assert float(keep_probabilities(scores, 0.5).sum()) == pytest.approx(50, rel=1e-6)


def outcomes(chance):
    """Every mask that one example can get, with its exact probability: the mask changes at few values of the draw."""
    cuts = sorted({0.0, 1.0, *(float(end) % 1.0 for end in chance.cumsum(0))})
    for low, high in itertools.pairwise(cuts):
        yield _systematic(chance[None], torch.tensor([(low + high) / 2], dtype=torch.float64))[0], high - low


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.8])
def test_unbiased_by_exact_enumeration(ratio):
    """The expected weight of every token is 1, so the expectation of any weighted sum of gradients is the full one."""
    chance = keep_probabilities(spread(23, seed=3), ratio)
    expected, total = torch.zeros(23, dtype=torch.float64), 0.0
    for mask, probability in outcomes(chance):
        expected[mask] += probability / chance[mask]
        total += probability
        assert abs(int(mask.sum()) - float(chance.sum())) < 1.0 + 1e-9
    assert total == pytest.approx(1.0)
    assert torch.allclose(expected, torch.ones_like(expected), atol=1e-9)


def test_unbiased_draws_one_number_per_example():
    scores, valid = window(spread(9, 1).tolist(), spread(12, 2).tolist(), [None, 1.0, None, 4.0])
    weights = token_weights("unbiased", scores, valid, ratio=0.5, generator=seeded(5))
    assert not weights[~valid].any()
    chance = keep_probabilities(scores[valid].double(), 0.5)
    kept = weights[valid] > 0
    assert torch.allclose(weights[valid][kept], 1 / chance[kept])
    assert torch.equal(weights, token_weights("unbiased", scores, valid, ratio=0.5, generator=seeded(5)))
    others = [token_weights("unbiased", scores, valid, ratio=0.5, generator=seeded(seed)) for seed in range(20)]
    assert any(not torch.equal(weights, other) for other in others)
    # padding on the right changes nothing
    wider = [torch.cat([part, torch.zeros(3, 5, dtype=part.dtype)], dim=1) for part in (scores, valid)]
    assert torch.equal(token_weights("unbiased", *wider, ratio=0.5, generator=seeded(5))[:, :12], weights)


def test_unbiased_draws_by_the_exponent_that_is_asked_for():
    scores, valid = window([1.0, 9.0, 25.0, 49.0, 4.0, 16.0])
    for gamma in (0.5, 1.0):
        weights = token_weights("unbiased", scores, valid, ratio=0.5, generator=seeded(3), gamma=gamma)[0]
        chance = keep_probabilities(scores[0], 0.5, gamma)
        assert int((weights > 0).sum()) == 3
        assert torch.allclose(weights[weights > 0], 1 / chance[weights > 0])


def test_unbiased_draws_each_example_by_itself():
    """Eight examples of the same scores: of one draw for all of them each would keep the same tokens."""
    scores, valid = window(*[spread(12, 1).tolist()] * 8)
    for seed in range(5):
        masks = token_weights("unbiased", scores, valid, ratio=0.5, generator=seeded(seed)) > 0
        assert len({tuple(mask) for mask in masks.tolist()}) > 1


def test_keeping_all_is_the_full_objective():
    scores, valid = window(spread(9).tolist(), [None, 1.0])
    for objective in ("hard", "unbiased"):
        weights = token_weights(objective, scores, valid, ratio=1.0, generator=seeded())
        assert torch.allclose(weights, token_weights("full", scores, valid))


@pytest.mark.parametrize("objective", ["full", "hard", "soft", "unbiased"])
def test_no_targets(objective):
    scores, valid = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool)
    assert not token_weights(objective, scores, valid, generator=seeded()).any()


@pytest.mark.parametrize(
    ("objective", "ratio", "match"),
    [
        ("harder", 0.5, "one of full, hard, soft, unbiased, not 'harder'"),
        ("hard", 0.0, r"above 0 and at most 1 \(0.5 keeps half\), not 0.0"),
        ("hard", math.nan, "not nan"),
        ("hard", "half", "not 'half'"),
        ("unbiased", 0.5, "generator=torch.Generator"),
    ],
)
def test_refusals(objective, ratio, match):
    scores, valid = window([1, 2])
    with pytest.raises(ConfigError, match=match):
        token_weights(objective, scores, valid, ratio=ratio)
