"""What a server meets: threads, rows of all lengths, builds that tokens cannot be dropped from, forked chats."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from accelerate import dispatch_model
from families import left_padded, make_ids, make_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    DynamicCache,
    PhimoeConfig,
    PhimoeForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from fedfstq_hf.errors import ConfigError, DataError
from fedfstq_hf.generation.attention import window_attention
from fedfstq_hf.generation.blocks import read_at
from fedfstq_hf.generation.logits_processor import TokenReductionLogitsProcessor
from fedfstq_hf.generation.published import HUB_PATH, custom_generate_source
from fedfstq_hf.generation.reducer import TokenReducer
from fedfstq_hf.generation.scorers import QueryAttention

NEW = 6
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.3}
SIZES |= {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
BUILDS = {
    "cohere": {},  # interleaved rotary positions
    "gpt_oss": {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},  # sinks
    "phi3": {},  # one projection for q, k and v
    "olmo2": {},  # norms after the blocks
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 5.0},
    "qwen3": {"head_dim": 8},
    "glm": {"head_dim": 8},  # half of each head is rotated
    "starcoder2": {},
    "stablelm": {},
}


def make(kind):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES, **BUILDS[kind])
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


@pytest.mark.parametrize("kind", BUILDS)
@torch.no_grad()
def test_attention_is_the_layers_own_in_every_build(kind):
    model, ids = make(kind), make_ids(2, 40)
    own = model(ids, output_attentions=True).attentions[2][:, :, -8:]
    found = window_attention(read_at(model, 2, ids, torch.ones_like(ids)), 8)
    torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_a_model_that_accelerate_has_dispatched():
    """Its modules have wrappers around their forward passes."""
    model, ids = make("qwen3"), make_ids(2, 40)
    own = model(ids, output_attentions=True).attentions[2][:, :, -8:]
    dispatch_model(model, {"": "cpu"}, force_hooks=True)
    assert "forward" in vars(model.model.layers[2].self_attn)
    found = window_attention(read_at(model, 2, ids, torch.ones_like(ids)), 8)
    torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["cohere", "phi3", "olmo2", "qwen3"])
def test_the_published_code_keeps_the_same_tokens(tmp_path, kind):
    (tmp_path / HUB_PATH).parent.mkdir()
    (tmp_path / HUB_PATH).write_text(custom_generate_source(), encoding="utf-8")
    model, ids = make(kind), make_ids(2, 40)
    options = {"max_new_tokens": NEW, "do_sample": False}
    expected = model.generate(ids, custom_generate=TokenReducer(0.4, min_tokens=0), **options)
    published = {"custom_generate": str(tmp_path), "trust_remote_code": True, "keep_ratio": 0.4, "min_tokens": 0}
    assert torch.equal(model.generate(ids, **published, **options), expected)


def test_an_attention_that_cannot_be_asked_is_refused():
    model = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=4, n_head=4)).eval()
    ids = make_ids(1, 40)
    with pytest.raises(ConfigError, match="does not know the attention of BloomBlock"):
        window_attention(read_at(model, 2, ids, torch.ones_like(ids)), 8)


def test_threads_share_a_model():
    """Reduced and plain calls side by side give what each gives alone."""
    model, ids = make_model("llama"), [make_ids(1, 60, seed=seed) for seed in range(4)]

    def call(number):
        options = {"custom_generate": TokenReducer(0.5, min_tokens=0)} if number % 2 else {}
        return model.generate(ids[number % 4], max_new_tokens=NEW, do_sample=False, **options)

    expected = [call(number) for number in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(call, range(32)))
    for number, result in enumerate(found):
        assert torch.equal(result, expected[number % 4])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_short_row_is_kept_whole_beside_long_ones(implementation):
    model = make_model("llama")
    model.set_attn_implementation(implementation)
    lengths = [60, 30, 44]
    ids, mask = left_padded(lengths)
    for scorer in (QueryAttention(), QueryAttention(layer=0)):
        reducer = TokenReducer(0.4, min_tokens=40, scorer=scorer)
        both = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, custom_generate=reducer)
        for row, length in enumerate(lengths):
            alone = ids[row : row + 1, -length:]
            expected = model.generate(alone, max_new_tokens=NEW, do_sample=False, custom_generate=reducer)
            assert torch.equal(both[row, -NEW:], expected[0, -NEW:])
    reduced = TokenReducer(0.4, min_tokens=40, model=model).reduce(ids, mask)
    assert reduced["attention_mask"].sum(-1).tolist() == [24, 30, 18]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_rows_that_protect_more_do_not_change_others(implementation):
    model = make_model("llama")
    model.set_attn_implementation(implementation)
    ids, reducer = make_ids(2, 40), TokenReducer(0.7, min_tokens=0)
    flags = torch.zeros(2, 40, dtype=torch.bool)
    ids[0, 4:32] = 1  # the beginning of a text, which is always kept
    options = {"max_new_tokens": NEW, "do_sample": False, "custom_generate": reducer}
    both = model.generate(ids, protected=flags, **options)
    for row in range(2):
        alone = model.generate(ids[row : row + 1], protected=flags[row : row + 1], **options)
        assert torch.equal(both[row], alone[0])


def vision_model():
    vision = {"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 32}
    text = {name: SIZES[name] for name in list(SIZES)[:6]} | {
        "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}
    }
    marks = {"image_token_id": 63, "video_token_id": 62, "vision_start_token_id": 61, "vision_end_token_id": 60}
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(vision_config=vision, text_config=text, **marks)).eval()


def alibi_model():
    return BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=4, n_head=4)).eval()


@pytest.mark.parametrize("make_one", [vision_model, alibi_model])
def test_positions_that_cannot_be_kept(make_one):
    model, ids = make_one(), make_ids(1, 20).clamp_max(59)
    plain = model.generate(ids, max_new_tokens=2, do_sample=False)
    passed = model.generate(ids, max_new_tokens=2, do_sample=False, custom_generate=TokenReducer(0.5))
    assert torch.equal(passed, plain)
    with pytest.raises(ConfigError, match="takes no position_ids"):
        model.generate(ids, max_new_tokens=2, custom_generate=TokenReducer(0.5, min_tokens=0))


def test_a_build_that_reads_long_texts_anew():
    rope = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0]}
    rope |= {"short_mscale": 1.0, "long_mscale": 1.0, "original_max_position_embeddings": 48}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "original_max_position_embeddings": 48}
    sizes = SIZES | {"max_position_embeddings": 256}
    model = PhimoeForCausalLM(PhimoeConfig(**sizes, **experts, rope_scaling=rope)).eval()
    with pytest.raises(ConfigError, match="more than 48 tokens anew"):
        model.generate(make_ids(1, 60), max_new_tokens=2, custom_generate=TokenReducer(0.5, min_tokens=0))
    short = model.generate(make_ids(1, 40), max_new_tokens=2, custom_generate=TokenReducer(0.5, min_tokens=0))
    assert short.shape == (1, 42)


def test_layers_without_attention():
    config = AutoConfig.for_model("mamba", vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4)
    model, ids = AutoModelForCausalLM.from_config(config).eval(), make_ids(1, 20)
    with pytest.raises(ConfigError, match="layers without attention"):
        TokenReducer(0.5, min_tokens=0, model=model).reduce(ids)


def test_ways_of_running_that_are_refused():
    model, ids = make_model("llama"), make_ids(1, 40)
    reducer = TokenReducer(0.5, min_tokens=0)
    model.set_attn_implementation("flex_attention")
    with pytest.raises(ConfigError, match=r"set_attn_implementation\('sdpa'\)"):
        model.generate(ids, max_new_tokens=2, custom_generate=reducer)
    model.set_attn_implementation("sdpa")
    model.train()
    model.gradient_checkpointing_enable()
    with pytest.raises(ConfigError, match=r"call model.eval\(\)"):
        model.generate(ids, max_new_tokens=2, custom_generate=reducer)


@pytest.mark.parametrize("fork", ["batch_repeat_interleave", "batch_select_indices", "reorder_cache"])
def test_a_chat_that_is_forked_between_turns(fork):
    model, reducer = make_model("llama"), TokenReducer(0.5, min_tokens=0)
    ids, more = make_ids(2, 40, seed=1), make_ids(2, 10, seed=2)
    options = {"max_new_tokens": NEW, "do_sample": False, "custom_generate": reducer}

    def turn(rows, change, chosen):
        cache = DynamicCache(config=model.config)
        text = model.generate(rows, past_key_values=cache, **options)
        if change is not None:
            getattr(cache, change)(chosen)
            text = text.repeat_interleave(2, dim=0) if change == "batch_repeat_interleave" else text[chosen]
        chat = torch.cat([text, more[: len(text)]], dim=1)
        return model.generate(chat, past_key_values=cache, **options)

    if fork == "batch_repeat_interleave":
        found, expected = turn(ids[:1], fork, 2), turn(ids[[0, 0]], None, None)
    else:
        order = torch.tensor([1]) if fork == "batch_select_indices" else torch.tensor([1, 0])
        found, expected = turn(ids, fork, order), turn(ids[order], None, None)
    assert torch.equal(found, expected)


def test_the_processor_sees_padding_without_a_pad_id():
    model = make_model("llama")
    model.generation_config.pad_token_id = None
    ids, mask = left_padded([60, 40])
    processor = TokenReductionLogitsProcessor(TokenReducer(0.5, min_tokens=0), model)
    alone = {"input_ids": ids[1:], "attention_mask": mask[1:]}
    with pytest.raises(DataError, match="padded"):
        model.generate(**alone, past_key_values=processor.cache, logits_processor=[processor], max_new_tokens=2)


def test_a_prompt_that_is_left_alone_is_said_once(caplog):
    model, reducer = make_model("llama"), TokenReducer(0.5)
    with caplog.at_level("WARNING"):
        for _ in range(2):
            model.generate(make_ids(1, 20), max_new_tokens=2, custom_generate=reducer)
    assert [record.message for record in caplog.records if "passes through whole" in record.message] == [
        "A prompt of 20 tokens passes through whole, as all do that have fewer than min_tokens=128."
    ]


@pytest.mark.parametrize(
    "settings", [{"keep_ratio": "0.5"}, {"keep_tokens": 20.5}, {"keep_ratio": True}, {"min_tokens": "8"}]
)
def test_settings_of_another_type(settings):
    with pytest.raises(ConfigError, match=r"expected a (whole )?number"):
        TokenReducer(**settings)


def test_a_folder_that_is_not_there():
    with pytest.raises(ConfigError, match="there is no folder /typo"):
        TokenReducer.from_pretrained("/typo")
