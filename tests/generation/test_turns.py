"""Caches that outlive a call: chats of several turns, caches of the caller, and the guard on a cut cache."""

from __future__ import annotations

import copy

import pytest
import torch
from families import left_padded, make_ids, make_model
from transformers import DynamicCache, StaticCache

from fedfstq_hf.errors import ConfigError, DataError
from fedfstq_hf.generation.cache import tokens_seen
from fedfstq_hf.generation.reducer import TokenReducer
from fedfstq_hf.generation.scorers import QueryAttention, Rarity, Recency

NEW = 6


def reference(model, ids, hidden):
    """Greedy tokens with the entries `hidden` (B, T) masked, no cache, positions of the unpadded text."""
    mask, positions = hidden.clone(), None
    for _ in range(NEW):
        positions = torch.arange(ids.shape[1]).expand(ids.shape) - offset(ids)
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions.clamp_min(0), use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return ids


def offset(ids):
    return (ids == 0).long().cumprod(-1).sum(-1, keepdim=True)


class HookedRarity(Rarity):
    """The same scores, read at block 0: tokens are dropped by the hooks, before any of them met."""

    layer = 0

    def score_block(self, inputs):
        return self.scores(None, inputs.input_ids, inputs.attention_mask)


@pytest.mark.parametrize("scorer", [Rarity(), HookedRarity()])
@pytest.mark.parametrize("lengths", [[40], [40, 29]])
@torch.no_grad()
def test_second_turn_on_a_cut_cache(lengths, scorer):
    """Two turns with one cache give what one masked pass over the whole chat gives."""
    model = make_model(eos_token_id=None)
    ids, mask = left_padded(lengths)
    rows = len(lengths)
    reducer = TokenReducer(0.5, min_tokens=0, scorer=scorer, first=4, last=8)
    cache = DynamicCache(config=model.config)
    options = {"max_new_tokens": NEW, "do_sample": False, "past_key_values": cache, "custom_generate": reducer}
    first = model.generate(ids, attention_mask=mask, **options)
    assert torch.equal(first, reference(model, ids, shown(reducer, model, ids, mask)))
    assert tokens_seen(cache) == first.shape[1] - 1

    said = make_ids(rows, 20, seed=9)
    chat = torch.cat([first, said], dim=1)
    whole = torch.cat([mask, torch.ones(rows, NEW + 20, dtype=torch.long)], dim=1)
    second = model.generate(chat, attention_mask=whole, **options)
    new = chat[:, first.shape[1] - 1 :]  # the last token of the first turn is not in the cache yet
    later = TokenReducer(0.5, min_tokens=0, scorer=Rarity(), first=0, last=8)
    hidden = torch.cat(
        [
            shown(reducer, model, ids, mask),
            torch.ones(rows, NEW - 1, dtype=torch.long),
            shown(later, model, new, torch.ones_like(new)),
        ],
        dim=1,
    )
    assert torch.equal(second, reference(model, chat, hidden))


def shown(reducer, model, ids, mask):
    """(B, T) mask of what a reducer keeps of a prompt on its own."""
    return torch.zeros_like(ids).scatter(1, reducer.kept(ids, mask, model).positions, 1) * mask


@torch.no_grad()
def test_turn_after_a_plain_one_keeps_all_of_the_past():
    model, ids = make_model(), make_ids(1, 40)
    cache = DynamicCache(config=model.config)
    first = model.generate(ids, max_new_tokens=NEW, do_sample=False, past_key_values=cache)
    chat = torch.cat([first, make_ids(1, 30, seed=4)], dim=1)
    new = chat[:, first.shape[1] - 1 :]
    for scorer in (Rarity(), QueryAttention()):
        reducer = TokenReducer(0.5, min_tokens=0, scorer=scorer)
        own = copy.deepcopy(cache)
        result = model.generate(chat, max_new_tokens=NEW, do_sample=False, past_key_values=own, custom_generate=reducer)
        assert own.get_seq_length() == first.shape[1] - 1 + 16 + NEW - 1  # 16 of the 31 new tokens
        assert tokens_seen(own) == result.shape[1] - 1
    later = TokenReducer(0.5, min_tokens=0, scorer=Rarity(), first=0)
    hidden = torch.cat([torch.ones_like(first[:, :-1]), shown(later, model, new, torch.ones_like(new))], dim=1)
    expected = reference(model, chat, hidden)
    own = copy.deepcopy(cache)
    reducer = TokenReducer(0.5, min_tokens=0, scorer=Rarity())
    result = model.generate(chat, max_new_tokens=NEW, do_sample=False, past_key_values=own, custom_generate=reducer)
    assert torch.equal(result, expected)


def test_short_second_turn_goes_through_whole():
    model, ids = make_model(), make_ids(1, 40)
    reducer = TokenReducer(0.5, min_tokens=20)
    cache = DynamicCache(config=model.config)
    options = {"max_new_tokens": NEW, "do_sample": False, "past_key_values": cache, "custom_generate": reducer}
    first = model.generate(ids, **options)
    held = cache.get_seq_length()
    model.generate(torch.cat([first, make_ids(1, 5)], dim=1), **options)
    assert cache.get_seq_length() == held + 6 + NEW - 1


def test_only_new_tokens_may_be_passed_with_the_whole_mask():
    model, ids = make_model(), make_ids(1, 40)
    reducer = TokenReducer(0.5, min_tokens=0)
    cache = DynamicCache(config=model.config)
    options = {"max_new_tokens": NEW, "do_sample": False, "custom_generate": reducer}
    first = model.generate(ids, past_key_values=cache, **options)
    chat = torch.cat([first, make_ids(1, 20, seed=2)], dim=1)
    again = copy.deepcopy(cache)
    whole = model.generate(chat, past_key_values=cache, **options)
    part = model.generate(
        chat[:, first.shape[1] - 1 :], attention_mask=torch.ones_like(chat), past_key_values=again, **options
    )
    assert torch.equal(part[:, -NEW:], whole[:, -NEW:])


def test_cut_cache_refuses_plain_generate_and_forward():
    model, ids = make_model(), make_ids(1, 40)
    cache = DynamicCache(config=model.config)
    reducer = TokenReducer(0.5, min_tokens=0)
    result = model.generate(ids, max_new_tokens=NEW, past_key_values=cache, custom_generate=reducer)
    held = cache.get_seq_length()
    for call in (
        lambda: model.generate(result, max_new_tokens=2, past_key_values=cache),
        lambda: model(result[:, -1:], past_key_values=cache),
    ):
        with pytest.raises(ConfigError, match="lacks 20 tokens"):
            call()
    assert cache.get_seq_length() == held
    returned = model.generate(ids, max_new_tokens=2, custom_generate=reducer, return_dict_in_generate=True)
    with pytest.raises(ConfigError, match="lacks 20 tokens"):
        model.generate(returned.sequences, max_new_tokens=2, past_key_values=returned.past_key_values)
    cache.reset()
    model.generate(ids, max_new_tokens=2, past_key_values=cache)


def test_cache_with_nothing_new_is_refused():
    model, ids = make_model(), make_ids(1, 40)
    cache = DynamicCache(config=model.config)
    reducer = TokenReducer(0.5, min_tokens=0)
    model.generate(ids, max_new_tokens=NEW, past_key_values=cache, custom_generate=reducer)
    with pytest.raises(DataError, match="already stands for"):
        model.generate(ids, max_new_tokens=NEW, past_key_values=cache, custom_generate=reducer)


def test_caches_of_other_kinds_are_refused():
    model, ids = make_model(), make_ids(1, 40)
    reducer = TokenReducer(0.5, min_tokens=0)
    static = StaticCache(config=model.config, max_cache_len=64)
    with pytest.raises(ConfigError, match="DynamicCache"):
        model.generate(ids, max_new_tokens=2, past_key_values=static, custom_generate=reducer)
    plain = DynamicCache()  # without a config its layers appear during the prefill
    result = model.generate(ids, max_new_tokens=2, past_key_values=plain, custom_generate=reducer)
    assert tokens_seen(plain) == result.shape[1] - 1


def test_recency_scores_do_not_depend_on_the_model():
    assert torch.equal(Recency().scores(None, make_ids(1, 3), torch.ones(1, 3)), torch.tensor([[0.0, 1.0, 2.0]]))
