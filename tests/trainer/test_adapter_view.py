"""The bridge to PEFT: one vector in schema order, and refusals that say what to do."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from tiny import make_tiny_data, make_tiny_model
from transformers import LlamaForCausalLM

from fedfstq_hf.adapter import (
    AdapterView,
    base_fingerprint,
    check_same_adapter,
    check_same_base,
    config_json,
)
from fedfstq_hf.errors import AdapterMismatchError
from fedfstq_hf.federation import adapter_file


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(torch.tensor([row["input_ids"] for row in make_tiny_data(2)])).logits


def randomise(model, seed=3):
    view = AdapterView(model)
    view.write(torch.randn(view.schema.num_params, generator=torch.Generator().manual_seed(seed)) / 10)
    return view


@pytest.mark.parametrize("lora", [{}, {"use_dora": True}, {"use_rslora": True}])
def test_the_vector_is_peft_s_state_in_schema_order(lora):
    model = make_tiny_model(**lora)
    view = randomise(model)
    vector, state = view.read(), get_peft_model_state_dict(model, save_embedding_layers=False)
    assert (vector.dtype, vector.device.type, tuple(vector.shape)) == (torch.float32, "cpu", (view.schema.num_params,))
    for spec, parameter in zip(view.schema.tensors, view.parameters, strict=True):
        part = vector[spec.offset : spec.offset + spec.size].view(spec.shape)
        assert torch.equal(part, state[spec.name])
        assert torch.equal(part, parameter)
    assert [spec.name for spec in view.schema.tensors] == sorted(state)


def test_a_read_is_a_copy_and_a_write_reaches_the_model(tiny_model):
    view = AdapterView(tiny_model)
    before, old = logits(tiny_model), view.read()
    randomise(tiny_model)
    assert not torch.equal(logits(tiny_model), before)
    view.write(old)
    assert torch.equal(logits(tiny_model), before)


def test_gradients_are_in_schema_order_and_zero_where_there_are_none(tiny_model):
    view = AdapterView(tiny_model)
    assert all(not gradient.any() for gradient in view.gradients())
    batch = torch.tensor([row["input_ids"] for row in make_tiny_data(2)])
    tiny_model(input_ids=batch, labels=batch).loss.backward()
    for parameter, gradient in zip(view.parameters, view.gradients(), strict=True):
        assert gradient is parameter.grad
    assert any(gradient.any() for gradient in view.gradients())


def test_a_published_adapter_loads_with_plain_peft(tmp_path, tiny_model):
    view = randomise(tiny_model)
    expected = logits(tiny_model)
    (tmp_path / "adapter_model.safetensors").write_bytes(adapter_file.dump(view.state()))
    (tmp_path / "adapter_config.json").write_bytes(config_json(tiny_model, view.name))
    base = make_tiny_model().unload()
    loaded = PeftModel.from_pretrained(base, tmp_path)
    assert torch.equal(logits(loaded), expected)
    assert json.loads(config_json(tiny_model, view.name))["inference_mode"] is True


def test_the_file_of_an_adapter_is_the_same_each_time(tiny_model):
    state = AdapterView(tiny_model).state()
    assert adapter_file.dump(state) == adapter_file.dump(dict(reversed(state.items())))
    assert config_json(tiny_model, "default") == config_json(make_tiny_model(), "default")


def test_a_model_without_lora_says_how_to_wrap_it():
    base = make_tiny_model().unload()
    assert isinstance(base, LlamaForCausalLM)
    with pytest.raises(
        AdapterMismatchError, match=r"Expected a PEFT model, got LlamaForCausalLM: .*get_peft_model\(model,"
    ):
        AdapterView(base)


def test_two_active_adapters_say_what_to_call(tiny_model):
    tiny_model.add_adapter("other", LoraConfig(r=2, target_modules="all-linear"))
    tiny_model.base_model.set_adapter(["default", "other"])
    with pytest.raises(
        AdapterMismatchError, match=r"one active adapter, found \['default', 'other'\].*set_adapter\(NAME\)"
    ):
        AdapterView(tiny_model)


def test_a_second_adapter_that_is_not_active_is_left_alone(tiny_model):
    tiny_model.add_adapter("other", LoraConfig(r=2, target_modules="all-linear"))
    view = AdapterView(tiny_model)
    assert view.name == "default"
    assert view.schema == AdapterView(make_tiny_model()).schema


def test_a_frozen_adapter_says_how_to_unfreeze(tiny_model):
    for parameter in tiny_model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(AdapterMismatchError, match=r"is not trainable\. Make the adapter with inference_mode=False"):
        AdapterView(tiny_model)


def test_something_else_that_trains_is_named(tiny_model):
    tiny_model.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(
        AdapterMismatchError, match=r"norm\.weight is trainable but no part .* Freeze it \(requires_grad_"
    ):
        AdapterView(tiny_model)


def test_an_adapter_in_half_precision_is_refused():
    base = make_tiny_model().unload()
    model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear"))
    model.to(torch.bfloat16)
    with pytest.raises(
        AdapterMismatchError, match=r"is torch\.bfloat16; expected float32, .*autocast_adapter_dtype=True"
    ):
        AdapterView(model)


def test_a_bfloat16_base_has_a_float32_adapter():
    base = make_tiny_model().unload().to(torch.bfloat16)
    view = AdapterView(get_peft_model(base, LoraConfig(r=4, target_modules="all-linear")))
    assert view.schema == AdapterView(make_tiny_model()).schema


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_4"])
def test_initialisations_that_change_the_base_are_refused(init):
    with pytest.raises(AdapterMismatchError, match=f"init_lora_weights='{init}' changes the base model's weights"):
        AdapterView(make_tiny_model(init_lora_weights=init))


def test_the_same_adapter_passes(tiny_model):
    mine = tiny_model.peft_config["default"].to_dict()
    check_same_adapter(mine, json.loads(config_json(tiny_model, "default")))
    check_same_adapter(make_tiny_model(lora_dropout=0.1).peft_config["default"].to_dict(), mine)


@pytest.mark.parametrize(
    ("lora", "match"),
    [
        ({"r": 8}, "has lora_alpha=16, the federation's has 8"),
        ({"use_rslora": True}, "has use_rslora=True, the federation's has False"),
        ({"use_dora": True}, "has use_dora=True"),
        ({"rank_pattern": {"q_proj": 2}}, "has rank_pattern="),
        ({"alpha_pattern": {"q_proj": 2}}, "has alpha_pattern="),
    ],
)
def test_another_lora_config_is_named_with_the_remedy(tiny_model, lora, match):
    theirs = json.loads(config_json(tiny_model, "default"))
    mine = make_tiny_model(**lora).peft_config["default"].to_dict()
    with pytest.raises(
        AdapterMismatchError, match=f"{match}.*Make the adapter from the federation's adapter_config.json"
    ):
        check_same_adapter(mine, theirs)


def test_a_base_is_recognised_across_precisions():
    theirs = base_fingerprint(make_tiny_model())
    check_same_base(base_fingerprint(make_tiny_model()), theirs, "tiny")
    half = get_peft_model(make_tiny_model().unload().to(torch.bfloat16), LoraConfig(target_modules="all-linear"))
    check_same_base(base_fingerprint(half), theirs, "tiny")
    assert json.loads(json.dumps(theirs)) == theirs


@pytest.mark.parametrize("change", ["zeroed", "scaled", "reversed"])
@pytest.mark.parametrize("part", ["mlp.down_proj", "input_layernorm", "q_proj.base_layer"])
def test_a_base_with_one_other_tensor_is_another_base(change, part):
    theirs, other = base_fingerprint(make_tiny_model()), make_tiny_model()
    with torch.no_grad():
        for name, tensor in other.named_parameters():
            if f"layers.1.{part}" in name.replace("self_attn.", "") and "lora_" not in name:
                kept = tensor.clone() + (0.1 * torch.arange(tensor.numel()).view_as(tensor) if tensor.ndim < 2 else 0)
                changed = {"zeroed": 0 * kept, "scaled": 1.5 * kept, "reversed": kept.flip(0)}[change]
                tensor.copy_(changed)
    with pytest.raises(AdapterMismatchError, match=r"other weights \(tensor_(sizes|probes)\). Load the base model"):
        check_same_base(base_fingerprint(other), theirs, "org/tiny")


def test_a_quantised_base_is_compared_in_what_is_not_quantised():
    theirs, mine = base_fingerprint(make_tiny_model()), base_fingerprint(make_tiny_model())
    for name in ("tensor_sizes", "tensor_probes"):
        mine[name][8:] = [None] * 24
    check_same_base(mine, theirs, "tiny")
    check_same_base(theirs, mine, "tiny")
    mine["tensor_sizes"][0] = (mine["tensor_sizes"][0] or 0) + 1.0
    with pytest.raises(AdapterMismatchError, match="tensor_sizes"):
        check_same_base(mine, theirs, "tiny")


def test_a_base_whose_layers_hold_no_parameters_is_compared_by_the_others():
    """As GPTQ and AWQ have them: packed weights and biases are buffers."""
    theirs, packed = base_fingerprint(make_tiny_model()), make_tiny_model()
    packed.get_base_model().config.quantization_config = {"quant_method": "gptq"}
    for module in packed.modules():
        if isinstance(module, torch.nn.Linear) and module is not packed.get_base_model().lm_head:
            weight = module._parameters.pop("weight")
            module.register_buffer("weight", weight.detach())
    check_same_base(base_fingerprint(packed), theirs, "tiny")
    packed.get_base_model().model.norm.weight.data.mul_(1.5)
    with pytest.raises(AdapterMismatchError, match="tensor_sizes"):
        check_same_base(base_fingerprint(packed), theirs, "tiny")


def test_another_base_is_refused_with_the_model_to_load():
    theirs = base_fingerprint(make_tiny_model())
    with pytest.raises(
        AdapterMismatchError, match=r"other weights: its embeddings differ\. Load the base model 'org/tiny'"
    ):
        check_same_base(base_fingerprint(make_tiny_model(seed=1)), theirs, "org/tiny")
    with pytest.raises(
        AdapterMismatchError, match=r"has hidden_size=64, the federation's has 32\. Load the base model"
    ):
        check_same_base(base_fingerprint(make_tiny_model(hidden_size=64)), theirs, "org/tiny")
    with pytest.raises(AdapterMismatchError, match=r"has model_type=None"):
        check_same_base({}, theirs, "org/tiny")
