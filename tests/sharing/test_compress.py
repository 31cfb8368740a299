"""Compressing and loading again: what a reader gets, at which size, and what is refused."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, TaskType, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load, load_file
from tiny import make_tiny_data, make_tiny_model

from fedfstq_hf import compress_adapter, load_compressed_adapter, save_compressed_adapter
from fedfstq_hf.errors import AdapterMismatchError, BudgetError, ConfigError, DataError, MessageError, NonFiniteError
from fedfstq_hf.sharing.packed import EXACT_FILE, FACTS_FILE, MESSAGE_FILE
from fedfstq_hf.sharing.trained import trained_adapter
from tests.sharing.conftest import fresh_base, logits, trained

CONFIG_FILE = "adapter_config.json"


def relative(one, other):
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"use_dora": True},
        {"use_rslora": True},
        {"lora_bias": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3}},
        {"modules_to_save": ["lm_head"]},
    ],
)
def test_a_reader_gets_nearly_the_same_model(lora, tmp_path):
    model = trained(**lora)
    budget = {"modules_to_save": 14500, "use_dora": 8000, "lora_bias": 8500}.get(next(iter(lora), ""), 5000)
    made = save_compressed_adapter(model, tmp_path / "small", budget)
    assert 0.96 * budget < made.num_bytes <= budget
    on_disk = sum(file.stat().st_size for file in (tmp_path / "small").iterdir())
    assert on_disk == made.num_bytes + len(made.card.encode())
    loaded = load_compressed_adapter(fresh_base(), tmp_path / "small")
    own, base = logits(model), logits(fresh_base())
    assert relative(logits(loaded) - base, own - base) < 0.03
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())


def test_a_bfloat16_base_and_adapter(tmp_path):
    model = trained().to(torch.bfloat16)
    made = save_compressed_adapter(model, tmp_path / "small", 6000, evaluation=make_tiny_data(4))
    assert made.plain_bytes < 12000
    assert set(made.after) == {"eval_loss", "exact_match"}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    loaded = load_compressed_adapter(fresh_base().to(torch.bfloat16), tmp_path / "small")
    assert relative(logits(loaded), logits(model)) < 0.05


def test_the_plain_file_holds_what_a_reader_gets(tmp_path):
    model = trained(use_dora=True)
    save_compressed_adapter(model, tmp_path / "small", 6000, include_plain=True)
    loaded = load_compressed_adapter(fresh_base(), tmp_path / "small")
    plain = PeftModel.from_pretrained(fresh_base(), tmp_path / "small")
    state = get_peft_model_state_dict(loaded, save_embedding_layers=False)
    file = load_file(tmp_path / "small" / "adapter_model.safetensors")
    assert all(torch.equal(file[name], state[name]) for name in state)
    assert torch.equal(logits(plain), logits(loaded))


def test_a_folder_with_its_own_base(tmp_path, tiny_recipe):
    from fedfstq_hf.running.foundation import load_base

    base, _ = load_base(str(tiny_recipe.parent / "model"), "float32")
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
    model.save_pretrained(tmp_path / "adapter")
    made = compress_adapter(tmp_path / "adapter", 4000)
    assert made.num_params == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_the_same_adapter_gives_the_same_files():
    one, two = (compress_adapter(trained(), 4000, calibration=make_tiny_data(4)) for _ in range(2))
    assert one.all_files() == two.all_files()


def test_a_known_start_is_used_where_it_is_smaller(tmp_path):
    # B alone has moved: all of A is in the seed
    base = fresh_base()
    torch.manual_seed(5)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 10)
    seeded = save_compressed_adapter(model, tmp_path / "seeded", 2600, init_seed=5)
    whole = compress_adapter(model, 2600)
    assert seeded.seeded
    assert not whole.seeded
    assert seeded.error < 0.5 * whole.error
    facts = json.loads(seeded.files[FACTS_FILE])
    assert facts["seed"] == 5
    loaded = load_compressed_adapter(fresh_base(), tmp_path / "seeded")
    assert relative(logits(loaded) - logits(fresh_base()), logits(model.eval()) - logits(fresh_base())) < 0.5
    # a seed that is not the adapter's is no harm
    assert not compress_adapter(trained(size=1.0), 4000, init_seed=99).seeded
    # a start that comes out otherwise is noticed
    facts["seed"] = 6
    (tmp_path / "seeded" / FACTS_FILE).write_text(json.dumps(facts))
    with pytest.raises(AdapterMismatchError, match=r"seed 6 gives here has another sha256.*torch's CPU generator"):
        load_compressed_adapter(fresh_base(), tmp_path / "seeded")


def test_calibration_spends_bits_where_the_task_needs_them():
    model, data = trained(size=0.3), make_tiny_data(24, seed=4)
    before = logits(model)

    def error(**options):
        made = compress_adapter(model, 2300, include_plain=True, **options)
        adapter = trained_adapter(model)
        with adapter.replaced(load(made.plain)):
            return relative(logits(model), before)

    assert error(calibration=data) < error()
    assert torch.equal(logits(model), before)


def test_quality_is_measured_with_the_values_that_a_reader_gets(tmp_path):
    model = trained()
    seen = []

    def metric(measured):
        seen.append(logits(measured))
        return {"score": float(len(seen)), "nan": float("nan")}

    made = save_compressed_adapter(model, tmp_path / "small", 3000, evaluation=metric)
    assert (made.before, made.after) == ({"score": 1.0}, {"score": 2.0})
    assert torch.equal(seen[0], logits(model))
    assert torch.equal(seen[1], logits(load_compressed_adapter(fresh_base(), tmp_path / "small")))


def test_other_codecs_and_their_budgets():
    fine = compress_adapter(trained(), "20bpp", codec="fp16")
    assert fine.error < 1e-6
    with pytest.raises(ConfigError, match="unknown codec 'unifrom'; did you mean 'uniform'"):
        compress_adapter(trained(), 4000, codec="unifrom")


def test_another_base_is_refused_and_left_as_it_was(folder):
    torch.manual_seed(77)
    other = make_tiny_model(seed=9).unload()
    names, before = [name for name, _ in other.named_parameters()], logits(other)
    with pytest.raises(AdapterMismatchError, match="was made for another base model: its embeddings differ"):
        load_compressed_adapter(other, folder)
    assert [name for name, _ in other.named_parameters()] == names
    assert torch.equal(logits(other), before)
    wide = make_tiny_model(hidden_size=64).unload()
    with pytest.raises(
        AdapterMismatchError, match="was made for another base model: hidden_size is 32 there and 64 here"
    ):
        load_compressed_adapter(wide, folder)
    with pytest.raises(AdapterMismatchError, match="already has an adapter"):
        load_compressed_adapter(trained(), folder)


def test_damaged_and_missing_files_are_named(folder):
    message = (folder / MESSAGE_FILE).read_bytes()
    (folder / MESSAGE_FILE).write_bytes(message[:-10])
    with pytest.raises(MessageError, match=f"{MESSAGE_FILE} has sha256 .*cut short"):
        load_compressed_adapter(fresh_base(), folder)
    (folder / MESSAGE_FILE).write_bytes(message + bytes(10**6))
    with pytest.raises(MessageError, match=r"more than the .* bytes that can belong"):
        load_compressed_adapter(fresh_base(), folder)
    (folder / MESSAGE_FILE).unlink()
    with pytest.raises(MessageError, match=f"{MESSAGE_FILE} cannot be read .No such file"):
        load_compressed_adapter(fresh_base(), folder)
    (folder / MESSAGE_FILE).write_bytes(message)
    config = (folder / CONFIG_FILE).read_bytes()
    (folder / CONFIG_FILE).write_bytes(config.replace(b'"lora_alpha":8', b'"lora_alpha":9'))
    with pytest.raises(MessageError, match=f"{CONFIG_FILE} has sha256"):
        load_compressed_adapter(fresh_base(), folder)
    (folder / FACTS_FILE).unlink()
    with pytest.raises(MessageError, match=f"{FACTS_FILE} cannot be read"):
        load_compressed_adapter(fresh_base(), folder)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"format": 2}, "format version 2, this package reads version 1"),
        ({"seed": "x"}, "wrong kind"),
        ({"sha256": {}}, "wrong kind"),
        ({"sha256": {"../../etc/passwd": "0" * 64}}, "wrong kind"),
        ({"num_params": 5}, "has 5 parameters"),
        ({"base": []}, "wrong kind"),
    ],
)
def test_facts_that_cannot_be_are_refused(folder, change, match):
    facts = json.loads((folder / FACTS_FILE).read_bytes())
    (folder / FACTS_FILE).write_text(json.dumps(facts | change))
    with pytest.raises((MessageError, AdapterMismatchError), match=match):
        load_compressed_adapter(fresh_base(), folder)
    (folder / FACTS_FILE).write_text("[" * 100_000)
    with pytest.raises(MessageError, match="cannot be read"):
        load_compressed_adapter(fresh_base(), folder)


def test_exact_tensors_have_to_be_the_adapter_s(tmp_path):
    made = compress_adapter(trained(use_dora=True), 6000)
    assert EXACT_FILE in made.files
    made.save(tmp_path / "small")
    facts = json.loads(made.files[FACTS_FILE])
    del facts["sha256"][EXACT_FILE]
    (tmp_path / "small" / FACTS_FILE).write_text(json.dumps(facts))
    with pytest.raises(MessageError, match=f"names no {EXACT_FILE}"):
        load_compressed_adapter(fresh_base(), tmp_path / "small")


def test_what_is_no_trained_lora_adapter_is_refused(tmp_path):
    with pytest.raises(AdapterMismatchError, match="Expected a PEFT model"):
        compress_adapter(fresh_base())
    prompt = get_peft_model(fresh_base(), PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2))
    with pytest.raises(AdapterMismatchError, match=r"peft_type is .*PROMPT_TUNING.*only LORA"):
        compress_adapter(prompt)
    with pytest.raises(AdapterMismatchError, match=r"adapter_config\.json"):
        compress_adapter(tmp_path / "nothing")
    trained().save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterMismatchError, match=r"no adapter_model\.safetensors"):
        compress_adapter(tmp_path / "adapter", base_model=fresh_base())
    broken = trained()
    broken.base_model.model.model.layers[1].mlp.up_proj.lora_A["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"layers\.1\.mlp\.up_proj\.lora_A\.weight holds NaN"):
        compress_adapter(broken)


def test_budgets_and_examples_that_cannot_work():
    with pytest.raises(BudgetError, match=r"comes to 464 bytes for 3712 parameters; .* take .*Give more"):
        compress_adapter(trained(), "1bpp")
    with pytest.raises(BudgetError, match="cannot be read"):
        compress_adapter(trained(), "small")
    with pytest.raises(DataError, match="calibration set is empty"):
        compress_adapter(trained(), 4000, calibration=[])
    with pytest.raises(DataError, match="no held-out examples"):
        compress_adapter(trained(), 4000, evaluation=[])


def test_an_existing_folder_is_left_alone(tmp_path, made):
    (tmp_path / "mine").write_text("x")
    for target in (tmp_path, tmp_path / "mine"):
        with pytest.raises(ConfigError, match="left alone"):
            made.save(target)
        with pytest.raises(ConfigError, match="left alone"):
            save_compressed_adapter(trained(), target)
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine"]
    assert (tmp_path / "mine").read_text() == "x"
