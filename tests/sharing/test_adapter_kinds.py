"""Adapters of many kinds: shared, read back on the right base, and judged by what the model does with them."""

import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import BdLoraConfig
from transformers import (
    BertConfig,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
)

from fedfstq_hf.cli import main
from fedfstq_hf.errors import AdapterMismatchError
from fedfstq_hf.sharing.compress import compress_adapter, effect_error
from fedfstq_hf.sharing.hub import expand_adapter, load_compressed_adapter
from fedfstq_hf.sharing.packed import EXACT_FILE, MESSAGE_FILE
from fedfstq_hf.sharing.trained import trained_adapter

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings"),  # PEFT's, about what is tried here
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers"),
]
SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(3))
SOUND = torch.randn(2, 700, generator=torch.Generator().manual_seed(4))
TEXT = torch.randint(2, 64, (3, 12), generator=torch.Generator().manual_seed(1))
TEXT[:, :2] = torch.tensor([3, 4])


def llama(tied=False, cls=LlamaForCausalLM):
    torch.manual_seed(0)
    return cls(LlamaConfig(**SIZES, tie_word_embeddings=tied, pad_token_id=0)).eval()


def resized():
    model = llama()
    torch.manual_seed(5)
    model.resize_token_embeddings(70)
    return model


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4)).eval()


def tied():
    return llama(tied=True)


def classifier():
    return llama(cls=LlamaForSequenceClassification)


def bert():
    torch.manual_seed(0)
    return BertForTokenClassification(BertConfig(**SIZES, num_labels=5)).eval()


def t5():
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()


def vit():
    torch.manual_seed(0)
    sizes = {name: SIZES[name] for name in SIZES if name != "vocab_size"}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=3)).eval()


def wav2vec():
    torch.manual_seed(0)
    convolutions = {"conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 4), "num_feat_extract_layers": 2}
    embeddings = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
    return Wav2Vec2ForCTC(Wav2Vec2Config(**SIZES, **convolutions, **embeddings)).eval()


KINDS = {
    "embeddings, tied": (tied, {"modules_to_save": ["embed_tokens"]}),
    "embeddings and head as one": (tied, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "embeddings and head": (llama, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "head, tied": (tied, {"modules_to_save": ["lm_head"]}),
    "resized": (resized, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "new tokens": (llama, {"trainable_token_indices": [3, 4]}),
    "new tokens, tied": (tied, {"trainable_token_indices": [3, 4]}),
    "new tokens by name": (llama, {"trainable_token_indices": {"embed_tokens": [1, 2]}}),
    "LoRA on embeddings": (tied, {"target_modules": ["q_proj", "embed_tokens"]}),
    "LoRA on the head": (llama, {"target_modules": ["q_proj", "lm_head"]}),
    "DoRA": (llama, {"use_dora": True}),
    "rank-stabilised": (llama, {"use_rslora": True}),
    "ranks by module": (llama, {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 3}}),
    "biases": (llama, {"bias": "all"}),
    "bias of LoRA": (llama, {"lora_bias": True}),
    "Conv1D": (gpt2, {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "classifier": (classifier, {"task_type": "SEQ_CLS"}),
    "tokens' classes": (bert, {"task_type": "TOKEN_CLS", "target_modules": ["query"]}),
    "encoder and decoder": (t5, {"task_type": "SEQ_2_SEQ_LM", "target_modules": ["q", "v"]}),
    "images": (vit, {"task_type": None, "target_modules": "all-linear", "modules_to_save": ["classifier"]}),
    "sound": (wav2vec, {"task_type": None, "target_modules": ["q_proj"]}),
    "after tokens of its own": (llama, {"alora_invocation_tokens": [3, 4]}),
}


@torch.no_grad()
def outputs(model):
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    inputs = {"input_ids": TEXT, "pixel_values": IMAGES, "input_values": SOUND}[base.main_input_name]
    more = {"decoder_input_ids": TEXT} if base.config.is_encoder_decoder else {}
    return model.eval()(**{base.main_input_name: inputs}, **more).logits.double()


def adapted(make, **settings):
    """A base with a trained adapter."""
    defaults = {"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, about tied weights
        model = get_peft_model(make(), LoraConfig(**(defaults | settings)))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def run(*arguments):
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in arguments])
    return stopped.value.code


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_back_does_what_the_adapter_did(kind, tmp_path):
    make, settings = KINDS[kind]
    model = adapted(make, **settings)
    own, without = outputs(model), outputs(make())
    made = compress_adapter(model, "80bpp")
    made.save(tmp_path / "small")
    read = outputs(load_compressed_adapter(make(), tmp_path / "small"))
    assert float((read - own).norm() / (own - without).norm()) < 0.02
    assert made.effect < 0.02
    model.save_pretrained(tmp_path / "plain")
    from_folder = compress_adapter(tmp_path / "plain", "80bpp", base_model=make())
    assert from_folder.files[MESSAGE_FILE] == made.files[MESSAGE_FILE]
    assert from_folder.files.get(EXACT_FILE) == made.files.get(EXACT_FILE)
    other = make()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    with pytest.raises(AdapterMismatchError, match="another base model"):
        load_compressed_adapter(other, tmp_path / "small")


def test_what_two_names_share_is_in_the_file_once():
    one = compress_adapter(adapted(tied, modules_to_save=["embed_tokens"], ensure_weight_tying=True), "80bpp")
    assert len(one.files[EXACT_FILE]) < 1.2 * 4 * 64 * 32


def mixtral():
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4)).eval()


@pytest.mark.parametrize(
    ("make", "settings", "said"),
    [
        (mixtral, {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters"),
        (
            llama,
            {"target_modules": ["q_proj"], "use_bdlora": BdLoraConfig(target_modules_bd_a=["q_proj"], nblocks=2)},
            "block-diagonal",
        ),
        (llama, {"layer_replication": [[0, 2], [1, 2]]}, "replicated"),
    ],
)
def test_what_is_no_product_of_two_matrices_is_refused(make, settings, said, tmp_path):
    model = adapted(make, **settings)
    with pytest.raises(AdapterMismatchError, match=f"{said}.*share this one as it is"):
        compress_adapter(model, "16bpp")
    model.save_pretrained(tmp_path / "plain")
    assert run("compress", tmp_path / "plain", "--out", tmp_path / "small", "--base-model", "demo") == 2
    assert not (tmp_path / "small").exists()


# What the card says is measured on the model


def test_the_effect_is_that_of_the_model_s_outputs():
    model = adapted(llama)
    adapter = trained_adapter(model)
    half = {name: tensor * 0.9 for name, tensor in adapter.state().items()}
    examples = [{"input_ids": row} for row in TEXT]
    own = torch.cat([model(row[None]).logits for row in TEXT]).double()
    with torch.no_grad(), adapter.replaced(half):
        other = torch.cat([model(row[None]).logits for row in TEXT]).double()
    without = outputs(llama())
    expected = float((other - own).norm() / (own - without).norm())
    assert effect_error(adapter, half, examples) == pytest.approx(expected, rel=1e-4)
    nothing = {name: torch.zeros_like(tensor) for name, tensor in adapter.state().items()}
    assert effect_error(adapter, nothing, examples) == pytest.approx(1.0, rel=1e-4)


def test_an_adapter_that_would_do_harm_is_not_made(monkeypatch):
    """Whatever goes wrong on the way: here a codec whose message decodes to something else."""
    from fedfstq_hf.sharing import compress

    original = compress.Coder.code

    def wrong(self, form):
        coded = original(self, form)
        coded.state.update({name: -tensor for name, tensor in coded.state.items() if ".lora_B." in name})
        return coded

    monkeypatch.setattr(compress.Coder, "code", wrong)
    with pytest.raises(AdapterMismatchError, match=r"off by \d+ % of what the adapter changes: worse than without it"):
        compress_adapter(adapted(llama), "16bpp")


def test_the_card_says_the_effect(tmp_path):
    made = compress_adapter(adapted(llama), "16bpp")
    assert f"by {100 * made.effect:.2g} % of what the trained one changes" in " ".join(made.card.split())


# Without this package, and without the base


def test_peft_s_error_names_this_package(tmp_path):
    compress_adapter(adapted(llama), "16bpp").save(tmp_path / "small")
    with pytest.raises(Exception, match=r"load_compressed_adapter of pip install fedfstq_hf"):
        PeftModel.from_pretrained(llama(), tmp_path / "small")


@pytest.mark.parametrize("kind", ["DoRA", "embeddings and head as one", "new tokens", "Conv1D"])
def test_expanding_needs_the_base_s_configuration_alone(kind, tmp_path):
    make, settings = KINDS[kind]
    compress_adapter(adapted(make, **settings), "80bpp").save(tmp_path / "small")
    make().config.save_pretrained(tmp_path / "base")
    expand_adapter(tmp_path / "small", tmp_path / "plain", base_model=str(tmp_path / "base"))
    expected = outputs(load_compressed_adapter(make(), tmp_path / "small"))
    assert torch.equal(outputs(PeftModel.from_pretrained(make(), tmp_path / "plain")), expected)


def test_a_pickled_adapter_is_read(tmp_path):
    model = adapted(llama)
    model.save_pretrained(tmp_path / "plain", safe_serialization=False)
    assert (tmp_path / "plain/adapter_model.bin").exists()
    made = compress_adapter(tmp_path / "plain", "80bpp", base_model=llama())
    assert made.files == compress_adapter(model, "80bpp").files


# From the command line


def test_classifiers_compress_and_expand_without_a_tokenizer(tmp_path, capsys, caplog):
    classifier().save_pretrained(tmp_path / "base")
    model = adapted(classifier, task_type="SEQ_CLS")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "plain")
    small = tmp_path / "small"
    assert run("compress", tmp_path / "plain", "--out", small, "--budget", "60bpp") == 0
    said = capsys.readouterr()
    assert "--base-model-name ORG/NAME" in caplog.text
    assert "off by 0.00" in said.out
    assert run("expand", small, "--out", tmp_path / "again") == 0
    again = PeftModel.from_pretrained(classifier(), tmp_path / "again")
    assert float((outputs(again) - outputs(model)).norm() / outputs(model).norm()) < 1e-2
    assert run("expand", small, "--out", tmp_path / "again") == 2
    named = ("--base-model-name", "lab/base", "--out", tmp_path / "named", "--budget", "60bpp")
    assert run("compress", tmp_path / "plain", "--base-model", tmp_path / "base", *named) == 0
    assert b'"base_model_name_or_path":"lab/base"' in (tmp_path / "named/adapter_config.json").read_bytes()
    assert str(tmp_path) not in (tmp_path / "named/README.md").read_text()
    assert run("compress", tmp_path / "plain", "--out", tmp_path / "x", "--data", "rows.jsonl") == 2
    assert "task_type is SEQ_CLS" in capsys.readouterr().err


def plain_of(make, base, folder, *, safe=True, **settings):
    """An adapter in a folder, with the folder of a base that differs from what it was trained on in its last layer."""
    base.save_pretrained(folder / "base")
    model = adapted(make, **settings)
    model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    model.save_pretrained(folder / "plain", safe_serialization=safe)
    return model


def three_classes():
    torch.manual_seed(0)
    return LlamaForSequenceClassification(LlamaConfig(**SIZES, pad_token_id=0, num_labels=3)).eval()


@pytest.mark.parametrize("safe", [True, False])
def test_a_head_has_the_classes_that_the_adapter_was_trained_with(safe, tmp_path, capsys):
    model = plain_of(three_classes, llama(), tmp_path, safe=safe, task_type="SEQ_CLS")
    assert run("compress", tmp_path / "plain", "--out", tmp_path / "small", "--budget", "60bpp") == 0
    assert "AutoModelForSequenceClassification" in (tmp_path / "small/README.md").read_text()
    assert ", num_labels=3)" in (tmp_path / "small/README.md").read_text()
    assert run("expand", tmp_path / "small", "--out", tmp_path / "again") == 0
    again = PeftModel.from_pretrained(three_classes(), tmp_path / "again")
    assert float((outputs(again) - outputs(model)).norm() / outputs(model).norm()) < 1e-2
    with pytest.raises(AdapterMismatchError, match=r"load the base with num_labels=3"):
        load_compressed_adapter(classifier(), tmp_path / "small")


@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["embed_tokens", "lm_head"]}])
def test_a_resized_vocabulary_is_resized_again(settings, tmp_path, capsys):
    model = plain_of(resized, llama(), tmp_path, **settings)
    assert run("compress", tmp_path / "plain", "--out", tmp_path / "small", "--budget", "80bpp") == 0
    assert run("expand", tmp_path / "small", "--out", tmp_path / "again") == 0
    again = PeftModel.from_pretrained(resized(), tmp_path / "again")
    assert float((outputs(again) - outputs(model)).norm() / outputs(model).norm()) < 1e-2
    with pytest.raises(AdapterMismatchError, match=r"base\.resize_token_embeddings\(70\)"):
        load_compressed_adapter(llama(), tmp_path / "small")


def test_new_rows_that_the_adapter_replaces_may_start_anywhere(tmp_path):
    compress_adapter(adapted(resized, **KINDS["resized"][1]), "80bpp").save(tmp_path / "small")
    torch.manual_seed(9)
    other = llama()
    other.resize_token_embeddings(70, mean_resizing=False)
    expected = outputs(load_compressed_adapter(resized(), tmp_path / "small"))
    assert torch.equal(outputs(load_compressed_adapter(other, tmp_path / "small")), expected)


def test_embeddings_that_are_neither_the_base_s_nor_the_adapter_s_are_refused(tmp_path):
    adapted(llama).save_pretrained(tmp_path / "plain", save_embedding_layers=True)
    compress_adapter(tmp_path / "plain", "80bpp", base_model=llama())
    other = llama()
    with torch.no_grad():
        other.model.embed_tokens.weight[3] += 1
    with pytest.raises(AdapterMismatchError, match=r"embed_tokens\.weight as a tensor of the base that is not this"):
        compress_adapter(tmp_path / "plain", "80bpp", base_model=other)


def test_which_of_several_adapters_and_what_is_compressed_already(tmp_path, capsys):
    model = adapted(llama)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["v_proj"]))
    model.save_pretrained(tmp_path / "plain", selected_adapters=["other"])
    assert run("compress", tmp_path / "plain", "--out", tmp_path / "x", "--base-model", "demo") == 2
    assert f"adapters in {tmp_path}/plain/other" in capsys.readouterr().err.replace("\n", "")
    compress_adapter(model, "80bpp").save(tmp_path / "small")
    assert run("compress", tmp_path / "small", "--out", tmp_path / "x", "--base-model", "demo") == 2
    assert "holds a compressed adapter already" in capsys.readouterr().err


def test_what_cannot_be_compared_is_said(caplog):
    model = adapted(vit, **KINDS["images"][1])
    model.get_base_model().config.num_channels = 4
    made = compress_adapter(model, "80bpp")
    assert made.effect is None
    assert "are not compared" in caplog.text
    assert "were not compared" in made.card
