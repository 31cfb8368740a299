"""What cannot be reduced is refused, with an error that says what was given and what to do."""

from __future__ import annotations

import pytest
import torch
from families import left_padded, make_ids, make_model
from transformers import BartConfig, BartForConditionalGeneration, MistralConfig, MistralForCausalLM

from fedfstq_hf.demo import load_model, load_tokenizer
from fedfstq_hf.errors import ConfigError, DataError
from fedfstq_hf.generation.reducer import TokenReducer
from fedfstq_hf.generation.scorers import QueryAttention, Rarity, Recency


@pytest.mark.parametrize("ratio", [0, 0.0, -0.5, 1.01, float("nan"), float("inf")])
def test_keep_ratio_outside_its_range(ratio):
    with pytest.raises(ConfigError, match="keep_ratio"):
        TokenReducer(ratio)


def test_settings_that_contradict_each_other():
    with pytest.raises(ConfigError, match="give one of them"):
        TokenReducer(0.5, keep_tokens=30)
    with pytest.raises(ConfigError, match="at least 12"):
        TokenReducer(keep_tokens=11)
    with pytest.raises(ConfigError, match="last is 0"):
        TokenReducer(0.5, last=0)


def test_protected_spans_longer_than_the_budget():
    tokenizer, model = load_tokenizer(), load_model()
    reducer = TokenReducer(0.5, tokenizer=tokenizer, model=model, min_tokens=0)
    inputs = reducer.encode("takes insulin daily. <keep>" + "denies fever. " * 20 + "</keep>name what is new:")
    for call in (
        lambda: reducer.reduce(**inputs),
        lambda: model.generate(**inputs, max_new_tokens=2, custom_generate=reducer),
    ):
        with pytest.raises(ConfigError, match=r"protected spans .* the budget is"):
            call()


def test_protected_tokens_survive_in_generate():
    model, ids = make_model(), make_ids(2, 40)
    protected = torch.zeros(2, 40, dtype=torch.bool)
    protected[0, 10:14], protected[1, 20:25] = True, True
    seen = {}

    class Watched(Recency):
        def scores(self, model, input_ids, attention_mask):
            return -super().scores(model, input_ids, attention_mask)

    reducer = TokenReducer(keep_tokens=17, scorer=Watched(), min_tokens=0, model=model)
    for row, flags in enumerate(reducer.reduce(ids, protected=protected)["position_ids"].tolist()):
        seen[row] = flags
    assert set(range(10, 14)) <= set(seen[0])
    assert set(range(20, 25)) <= set(seen[1])
    for beams in (1, 2):
        whole = model.generate(
            ids, max_new_tokens=4, do_sample=False, num_beams=beams, protected=protected, custom_generate=reducer
        )
        short = model.generate(
            **reducer.reduce(ids, protected=protected), max_new_tokens=4, do_sample=False, num_beams=beams
        )
        assert torch.equal(whole[:, -4:], short[:, -4:])
    with pytest.raises(DataError, match="one flag for each token"):
        model.generate(ids, max_new_tokens=4, protected=protected[:, :5], custom_generate=reducer)


def test_encoder_decoder_models():
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=64, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16, decoder_ffn_dim=16
    )
    model = BartForConditionalGeneration(config).eval()
    reducer = TokenReducer(0.5, min_tokens=0, model=model)
    with pytest.raises(ConfigError, match="encoder-decoder"):
        model.generate(make_ids(1, 20), max_new_tokens=2, num_beams=1, custom_generate=reducer)
    with pytest.raises(ConfigError, match="encoder-decoder"):
        reducer.reduce(make_ids(1, 20))


def test_embeddings_as_inputs():
    model, ids = make_model(), make_ids(1, 40)
    reducer = TokenReducer(0.5, min_tokens=0, model=model)
    embeddings = model.get_input_embeddings()(ids)
    with pytest.raises(ConfigError, match="inputs_embeds"):
        model.generate(inputs_embeds=embeddings, max_new_tokens=2, custom_generate=reducer)
    with pytest.raises(ConfigError, match="inputs_embeds"):
        reducer.reduce(ids, inputs_embeds=embeddings)
    with pytest.raises(ConfigError, match="token_type_ids"):
        reducer.reduce(ids, token_type_ids=ids)


def test_prompts_longer_than_the_context():
    model, ids = make_model(), make_ids(1, 129)  # the context is 128
    reducer = TokenReducer(0.5, min_tokens=0, model=model, scorer=Rarity())
    for call in (
        lambda: reducer.reduce(ids),
        lambda: model.generate(ids, max_new_tokens=2, custom_generate=reducer),
    ):
        with pytest.raises(ConfigError, match="129 tokens, the model's context is 128"):
            call()
    padded, mask = left_padded([128, 100])
    longer = torch.nn.functional.pad(padded, (5, 0)), torch.nn.functional.pad(mask, (5, 0))
    assert reducer.reduce(*longer)["input_ids"].shape == (2, 64)


def test_sliding_windows_that_would_bind():
    torch.manual_seed(0)
    settings = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    model = MistralForCausalLM(
        MistralConfig(**settings, num_attention_heads=4, num_key_value_heads=2, sliding_window=32, pad_token_id=0)
    ).eval()
    reducer = TokenReducer(0.5, min_tokens=0, model=model)
    with pytest.raises(ConfigError, match="see 32 tokens back, and the text may reach 44"):
        model.generate(make_ids(1, 40), max_new_tokens=4, custom_generate=reducer)
    with pytest.raises(ConfigError, match="see 32 tokens back"):
        reducer.reduce(make_ids(1, 40))
    result = model.generate(make_ids(1, 26), max_new_tokens=4, custom_generate=reducer)
    assert result.shape == (1, 30)
    plain = model.generate(make_ids(1, 40), max_new_tokens=4, do_sample=False)
    whole = TokenReducer(1.0, min_tokens=0)
    assert torch.equal(model.generate(make_ids(1, 40), max_new_tokens=4, do_sample=False, custom_generate=whole), plain)


def test_shapes_that_do_not_fit():
    reducer = TokenReducer(0.5, scorer=Recency())
    for ids, mask in ((make_ids(1, 8)[0], None), (make_ids(1, 8), torch.ones(1, 7)), (make_ids(1, 8)[:, :0], None)):
        with pytest.raises(DataError, match="expected the same"):
            reducer.reduce(ids, mask)


def test_models_of_an_unknown_build():
    model, ids = make_model(), make_ids(1, 40)
    for block in model.model.layers:
        block.self_attn.q_proj, block.self_attn.query = None, block.self_attn.q_proj
    with pytest.raises(ConfigError, match="does not know the attention"):
        QueryAttention().scores(load_unknown(model), ids, torch.ones_like(ids))


def load_unknown(model):
    """Blocks whose early layers still run: only the block that is read has lost its projection."""
    fresh = make_model()
    fresh.model.layers[2] = model.model.layers[2]
    return fresh
