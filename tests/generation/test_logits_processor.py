"""The cache shrinks after the prefill of a plain generate()."""

from __future__ import annotations

import pytest
import torch
from families import left_padded, make_ids, make_model
from transformers import DynamicCache

from fedfstq_hf.errors import ConfigError, DataError
from fedfstq_hf.generation.logits_processor import TokenReductionLogitsProcessor
from fedfstq_hf.generation.reducer import TokenReducer
from fedfstq_hf.generation.scorers import QueryAttention, Rarity

LENGTH, NEW = 40, 6


def run(model, ids, reducer, **options):
    processor = TokenReductionLogitsProcessor(reducer, model)
    settings = {"max_new_tokens": NEW, "do_sample": False} | options
    result = model.generate(ids, past_key_values=processor.cache, logits_processor=[processor], **settings)
    return result, processor


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2"])
@pytest.mark.parametrize("scorer", [QueryAttention(), Rarity()])
@torch.no_grad()
def test_cache_is_cut_and_positions_stay(family, scorer):
    model, ids = make_model(family), make_ids(2, LENGTH)
    reducer = TokenReducer(0.5, min_tokens=0, scorer=scorer)
    result, processor = run(model, ids, reducer)
    assert {layer.keys.shape[-2] for layer in processor.cache.layers} == {LENGTH // 2 + NEW - 1}
    kept = reducer.kept(ids, torch.ones_like(ids), model).positions
    cache = DynamicCache(config=model.config)
    logits = model(ids, past_key_values=cache, use_cache=True).logits
    for layer in cache.layers:
        index = kept[:, None, :, None].expand(-1, layer.keys.shape[1], -1, layer.keys.shape[-1])
        layer.keys, layer.values = layer.keys.gather(2, index), layer.values.gather(2, index)
    tokens = ids
    for step in range(NEW):
        tokens = torch.cat([tokens, logits[:, -1].argmax(-1, keepdim=True)], 1)
        position = torch.full((2, 1), LENGTH + step)
        logits = model(tokens[:, -1:], past_key_values=cache, position_ids=position, use_cache=True).logits
    assert torch.equal(result, tokens)


@torch.no_grad()
def test_sliding_layers_are_left_alone():
    model, ids = make_model("gemma2", sliding_window=16), make_ids(1, LENGTH)
    result, processor = run(model, ids, TokenReducer(0.5, min_tokens=0))
    lengths = [layer.keys.shape[-2] for layer in processor.cache.layers]
    assert lengths == [15, LENGTH // 2 + NEW - 1] * 2
    first = model.generate(ids, max_new_tokens=1)[0, -1]
    assert result[0, LENGTH] == first
    chat = torch.cat([result, make_ids(1, 20)], dim=1)
    with pytest.raises(ConfigError, match="sliding-window layers hold other tokens"):
        model.generate(
            chat, max_new_tokens=2, past_key_values=processor.cache, custom_generate=TokenReducer(0.5, min_tokens=0)
        )
    with pytest.raises(ConfigError, match="lacks 20 tokens"):
        model.generate(chat, max_new_tokens=2, past_key_values=processor.cache)


def test_keeping_everything_and_short_prompts_change_nothing():
    model, ids = make_model(), make_ids(1, LENGTH)
    expected = model.generate(ids, max_new_tokens=NEW, do_sample=False)
    for reducer in (TokenReducer(1.0, min_tokens=0), TokenReducer(0.5, min_tokens=LENGTH + 1)):
        result, processor = run(model, ids, reducer)
        assert torch.equal(result, expected)
        model.generate(result, past_key_values=processor.cache, max_new_tokens=2)  # nothing is missing


def test_beams():
    model, ids = make_model(), make_ids(1, LENGTH)
    result, processor = run(model, ids, TokenReducer(0.5, min_tokens=0), num_beams=3)
    assert result.shape == (1, LENGTH + NEW)
    assert processor.cache.get_seq_length() == LENGTH // 2 + NEW - 1


def test_padded_batches_are_refused():
    model = make_model()
    ids, mask = left_padded([40, 30])
    with pytest.raises(DataError, match="padded"):
        run(model, ids, TokenReducer(0.5, min_tokens=0), attention_mask=mask)


def test_cache_must_be_shared_and_new():
    model, ids = make_model(), make_ids(1, LENGTH)
    reducer = TokenReducer(0.5, min_tokens=0)
    processor = TokenReductionLogitsProcessor(reducer, model)
    with pytest.raises(ConfigError, match=r"past_key_values=processor\.cache"):
        model.generate(ids, max_new_tokens=2, logits_processor=[processor])


def test_plain_generate_does_not_go_on_with_the_cut_cache_but_a_reducer_does():
    model, ids = make_model(), make_ids(1, LENGTH)
    reducer = TokenReducer(0.5, min_tokens=0)
    result, processor = run(model, ids, reducer)
    chat = torch.cat([result, make_ids(1, 20, seed=3)], dim=1)
    with pytest.raises(ConfigError, match="lacks 20 tokens"):
        model.generate(chat, max_new_tokens=2, past_key_values=processor.cache)
    more = model.generate(chat, max_new_tokens=2, past_key_values=processor.cache, custom_generate=reducer)
    assert more.shape == (1, chat.shape[1] + 2)
