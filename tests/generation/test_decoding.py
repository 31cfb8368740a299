"""Ways of decoding on a shortened prompt: sampling, beams, streamers, lengths, adapters, precision."""

from __future__ import annotations

from threading import Thread

import pytest
import torch
from families import left_padded, make_ids, make_model
from peft import LoraConfig, get_peft_model
from transformers import TextIteratorStreamer

from fedfstq_hf.demo import load_tokenizer
from fedfstq_hf.errors import ConfigError
from fedfstq_hf.generation.reducer import TokenReducer
from fedfstq_hf.generation.scorers import QueryAttention, Rarity, Recency

LENGTH, NEW = 40, 8
WAYS = {
    "greedy": {"do_sample": False},
    "sample": {"do_sample": True, "top_k": 5},
    "beam": {"num_beams": 3, "do_sample": False},
    "beam sample": {"num_beams": 2, "do_sample": True},
    "several": {"do_sample": True, "num_return_sequences": 2},
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_agrees_with_plain_generate(way):
    model, ids = make_model(), make_ids(2, LENGTH)

    def tokens(**inputs):
        torch.manual_seed(5)
        return model.generate(max_new_tokens=NEW, **WAYS[way], **inputs)[:, -NEW:]

    assert torch.equal(tokens(input_ids=ids, custom_generate=TokenReducer(1.0, min_tokens=0)), tokens(input_ids=ids))
    reducer = TokenReducer(0.5, min_tokens=0, scorer=Rarity(), model=model)
    assert torch.equal(tokens(input_ids=ids, custom_generate=reducer), tokens(**reducer.reduce(ids)))
    early = TokenReducer(0.5, min_tokens=0, scorer=QueryAttention())
    rows = 2 * WAYS[way].get("num_return_sequences", 1)
    assert tokens(input_ids=ids, custom_generate=early).shape == (rows, NEW)


def test_result_is_the_whole_prompt_and_lengths_count_it():
    model, ids = make_model(), make_ids(2, LENGTH)
    reducer = TokenReducer(0.25, min_tokens=0)
    by_new = model.generate(ids, max_new_tokens=NEW, custom_generate=reducer)
    by_length = model.generate(ids, max_length=LENGTH + NEW, custom_generate=reducer)
    assert torch.equal(by_new[:, :LENGTH], ids)
    assert torch.equal(by_new, by_length)
    assert by_new.shape == (2, LENGTH + NEW)


def test_processors_see_the_whole_prompt():
    model, ids = make_model(), make_ids(1, LENGTH)
    seen = []
    model.generate(
        ids,
        max_new_tokens=2,
        custom_generate=TokenReducer(0.5, min_tokens=0),
        logits_processor=[lambda given, scores: seen.append(given.shape[1]) or scores],
    )
    assert seen == [LENGTH, LENGTH + 1]


def test_streamer_gets_prompt_and_tokens_as_from_plain_generate():
    model, ids = make_model(), make_ids(1, LENGTH)
    tokenizer = load_tokenizer()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=20)
    options = {"max_new_tokens": NEW, "do_sample": False, "custom_generate": TokenReducer(0.5, min_tokens=0)}
    result = model.generate(ids, **options)
    thread = Thread(target=model.generate, kwargs={"input_ids": ids, "streamer": streamer, **options})
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == tokenizer.decode(result[0, LENGTH:])


def test_short_prompts_pass_through_unscored():
    class Never:
        def scores(self, model, input_ids, attention_mask):
            raise AssertionError("scored")

    model, ids = make_model(), make_ids(1, LENGTH)
    plain = model.generate(ids, max_new_tokens=NEW, do_sample=False)
    reducer = TokenReducer(0.5, scorer=Never(), min_tokens=LENGTH + 1, model=model)
    assert torch.equal(model.generate(ids, max_new_tokens=NEW, do_sample=False, custom_generate=reducer), plain)
    assert torch.equal(reducer.reduce(ids)["input_ids"], ids)


@pytest.mark.parametrize("scorer", [QueryAttention(), Rarity()])
def test_adapter_and_merged_model_agree(scorer):
    torch.manual_seed(1)
    model = get_peft_model(make_model(), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).eval()
    ids, mask = left_padded([40, 30])
    reducer = TokenReducer(0.5, min_tokens=0, scorer=scorer, model=model)
    options = {"attention_mask": mask, "max_new_tokens": NEW, "do_sample": False, "custom_generate": reducer}
    with_adapter = model.generate(input_ids=ids, **options)
    reduced = reducer.reduce(ids, mask)
    merged = model.merge_and_unload()
    assert torch.equal(merged.generate(ids, **options), with_adapter)
    torch.testing.assert_close(TokenReducer(0.5, min_tokens=0, scorer=scorer, model=merged).reduce(ids, mask), reduced)


def test_bfloat16():
    model, ids = make_model().bfloat16(), make_ids(2, LENGTH)
    result = model.generate(ids, max_new_tokens=NEW, custom_generate=TokenReducer(0.5, min_tokens=0))
    assert result.shape == (2, LENGTH + NEW)
    reducer = TokenReducer(0.5, min_tokens=0, scorer=Recency(), model=model)
    expected = model.generate(**reducer.reduce(ids), max_new_tokens=NEW, do_sample=False)[:, -NEW:]
    found = model.generate(ids, max_new_tokens=NEW, do_sample=False, custom_generate=reducer)[:, -NEW:]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementations(implementation):
    model = make_model()
    model.set_attn_implementation(implementation)
    ids, mask = left_padded([40, 33])
    result = model.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, custom_generate=TokenReducer(0.5, min_tokens=0)
    )
    other = make_model()
    other.set_attn_implementation("eager" if implementation == "sdpa" else "sdpa")
    again = other.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, custom_generate=TokenReducer(0.5, min_tokens=0)
    )
    assert torch.equal(result, again)


def test_modes_it_does_not_know_are_refused():
    model, ids = make_model(), make_ids(1, LENGTH)
    reducer = TokenReducer(0.5, min_tokens=0)
    with pytest.raises(ConfigError, match="assist"):
        model.generate(ids, max_new_tokens=4, assistant_model=make_model(), custom_generate=reducer)
    with pytest.raises(ConfigError, match="use_cache"):
        model.generate(ids, max_new_tokens=4, use_cache=False, custom_generate=reducer)
