"""Each scorer on its own, on prompts made by hand."""

from __future__ import annotations

import pytest
import torch
from families import left_padded, make_ids, make_model

from fedfstq_hf.errors import ConfigError, DataError
from fedfstq_hf.generation.attention import window_attention
from fedfstq_hf.generation.blocks import read_at
from fedfstq_hf.generation.probe import Probe, ProbeFit
from fedfstq_hf.generation.scorers import (
    Combined,
    EarlyScorer,
    QueryAttention,
    Random,
    Rarity,
    Recency,
    Scorer,
    TokenTable,
    ranks,
)

ONES = torch.ones(1, 6, dtype=torch.long)
IDS = torch.tensor([[3, 4, 3, 5, 3, 4]])


def test_all_follow_the_protocol():
    scorers = [QueryAttention(), Recency(), Random(), Rarity(), TokenTable(torch.rand(64)), Probe(torch.rand(32))]
    scorers.append(Combined(scorers[1:3], [1, 1]))
    model, (ids, mask) = make_model(), left_padded([20, 11])
    for scorer in scorers:
        assert isinstance(scorer, Scorer)
        scores = scorer.scores(model, ids, mask)
        assert scores.shape == ids.shape
        assert not scores[mask.bool()].isnan().any()
    assert isinstance(QueryAttention(), EarlyScorer)
    assert not isinstance(Recency(), EarlyScorer)


def test_rarity_counts_the_prompt_or_a_corpus():
    assert Rarity().scores(None, IDS, ONES).argsort(descending=True)[0, 0] == 3
    counts = torch.tensor([0, 0, 0, 1, 50, 7])
    assert Rarity(counts).scores(None, IDS, ONES).argmax() == 0
    with pytest.raises(ConfigError, match="outside the counts"):
        Rarity(counts[:5]).scores(None, IDS, ONES)


def test_random_depends_on_seed_and_tokens_only():
    ids, mask = left_padded([9, 5])
    both = Random(1).scores(None, ids, mask)
    alone = Random(1).scores(None, ids[1:, 4:], mask[1:, 4:])
    assert torch.equal(both[1:, 4:], alone)
    assert not torch.equal(both, Random(2).scores(None, ids, mask))


def test_table_reads_ids_and_keeps_unseen_ones():
    table = torch.tensor([0.0, 0.0, 0.0, 2.0, 1.0, torch.inf])
    assert TokenTable(table).scores(None, IDS, ONES).tolist() == [[2, 1, 2, torch.inf, 2, 1]]
    with pytest.raises(ConfigError, match="another tokenizer"):
        TokenTable(table[:5]).scores(None, IDS, ONES)


def test_query_attention_is_pooled_peak_attention():
    model, ids = make_model(), make_ids(1, 24)
    inputs = read_at(model, 2, ids, torch.ones_like(ids))
    peak = window_attention(inputs, 4).mean(2).amax(1)[0]
    raw = QueryAttention(layer=2, window=4, reach=0).scores(model, ids, torch.ones_like(ids))[0]
    torch.testing.assert_close(raw, peak)
    wide = QueryAttention(layer=2, window=4, reach=1).scores(model, ids, torch.ones_like(ids))[0]
    expected = torch.stack([peak[max(0, i - 1) : i + 2].max() for i in range(24)])
    torch.testing.assert_close(wide, expected)


def test_early_scorers_stop_at_their_layer():
    model, ids = make_model(), make_ids(1, 10)
    ran = []
    handles = [b.register_forward_hook(lambda m, *_, i=i: ran.append(i)) for i, b in enumerate(model.model.layers)]
    QueryAttention(layer=2).scores(model, ids, torch.ones_like(ids))
    for handle in handles:
        handle.remove()
    assert ran == [0, 1]


def test_ranks_ignore_padding_and_share_ties():
    scores = torch.tensor([[9.0, 9.0, 1.0, 3.0, 3.0, 7.0]])
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    assert ranks(scores, mask)[0, 2:].tolist() == [0.0, 0.25, 0.25, 0.75]


def test_combination_weighs_ranks():
    table = TokenTable(torch.tensor([0.0, 0, 0, 100, 50, 0]))
    mixed = Combined([table, Recency()], [2, 1]).scores(None, IDS, ONES)
    expected = 2 * ranks(table.scores(None, IDS, ONES), ONES) + ranks(Recency().scores(None, IDS, ONES), ONES)
    torch.testing.assert_close(mixed, expected)
    model, ids = make_model(), make_ids(1, 20)
    mask, wide = torch.ones_like(ids), TokenTable(torch.rand(64, generator=torch.Generator().manual_seed(0)))
    early = Combined([QueryAttention(), wide], [1, 3])
    parts = ranks(QueryAttention().scores(model, ids, mask), mask) + 3 * ranks(wide.scores(None, ids, mask), mask)
    torch.testing.assert_close(early.scores(model, ids, mask), parts)
    assert early.layer == 2


@pytest.mark.parametrize(
    ("scorers", "weights"),
    [([], []), ([Recency()], [1, 2]), ([Recency()], [0]), ([QueryAttention(1), QueryAttention(2)], [1, 1])],
)
def test_bad_combinations(scorers, weights):
    with pytest.raises(ConfigError):
        Combined(scorers, weights)


def test_probe_recovers_a_linear_rule():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, generator=generator)
    fit = ProbeFit(16, layer=1, ridge=1e-8)
    for _ in range(4):
        hidden = torch.randn(2, 20, 16, generator=generator)
        g = (hidden @ weight + 0.7).exp()
        mask = torch.ones(2, 20)
        mask[0, :5], hidden[0, :5] = 0, 1e3
        fit.update(hidden, g, mask)
    probe = fit.solve()
    torch.testing.assert_close(probe.weight, weight, rtol=1e-3, atol=1e-3)
    assert probe.bias == pytest.approx(0.7, abs=1e-3)
    assert fit.num_tokens == 4 * 35


def test_probe_refuses_what_it_cannot_use():
    with pytest.raises(DataError, match="no token"):
        ProbeFit(4).solve()
    with pytest.raises(DataError, match="NaN"):
        ProbeFit(4).update(torch.full((1, 2, 4), torch.nan), torch.ones(1, 2), torch.ones(1, 2))
    model, ids = make_model(), make_ids(1, 8)
    with pytest.raises(ConfigError, match="hidden size 5"):
        Probe(torch.ones(5)).scores(model, ids, torch.ones_like(ids))
    with pytest.raises(ConfigError, match=r"blocks 0 \.\. 3"):
        Probe(torch.ones(32), layer=4).scores(model, ids, torch.ones_like(ids))
    with pytest.raises(ConfigError, match="got no model"):
        Probe(torch.ones(32)).scores(None, ids, torch.ones_like(ids))


@pytest.mark.parametrize("settings", [{"layer": -1}, {"window": 0}, {"reach": -1}])
def test_query_attention_settings(settings):
    with pytest.raises(ConfigError, match="expected at least"):
        QueryAttention(**settings)
