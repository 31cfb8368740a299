"""A mailbox's adapter_config.json: what it may ask of PEFT, and of the client's memory and time."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import sys
import types

import peft
import pytest
import torch
from peft import get_peft_model
from peft_kinds import KINDS
from tiny import make_tiny_model

from fedfstq_hf.adapter import base_fingerprint, check_same_adapter, check_same_base, config_json
from fedfstq_hf.adapters import size
from fedfstq_hf.adapters.allow_list import MAX_BYTES, believed, is_bounded
from fedfstq_hf.errors import AdapterMismatchError, MailboxError
from fedfstq_hf.federation import adapter_file
from fedfstq_hf.federation.founding import found_federation
from fedfstq_hf.federation.mailbox.folder import FolderMailbox
from fedfstq_hf.running import foundation
from fedfstq_hf.running.foundation import wrap_base
from tests.attacks.peak import peak_bytes
from tests.federation.light import initial_state, make_spec

BOMB = r"(([a-z_.]+)+)+\d!"


@functools.cache
def plain():
    return make_tiny_model().unload()


def base():
    return copy.deepcopy(plain())


def numbers_of(model) -> int:
    return sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))


def config(**changes) -> bytes:
    fields = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj", "v_proj"]} | changes
    return json.dumps({name: value for name, value in fields.items() if value is not ...}).encode()


@pytest.fixture
def no_peft(monkeypatch):
    """PEFT is not reached: neither its configuration is made, nor its matching begun."""

    def reached(*_, **__):
        raise AssertionError("PEFT was reached")

    plain()
    monkeypatch.setattr(foundation, "get_peft_model", reached)
    monkeypatch.setattr(peft.LoraConfig, "__post_init__", reached)


REFUSED = {
    "code by name": ({"megatron_config": {"a": 1}, "megatron_core": "evil"}, "megatron_config is .*Leave it out"),
    "the name alone": ({"megatron_core": "evil"}, "megatron_core is 'evil'"),
    "layers again and again": ({"layer_replication": [[0, 2]] * 2000}, "layer_replication is "),
    "a pattern that backtracks": ({"target_modules": BOMB}, "target_modules is .*bounded time"),
    "names that backtrack": ({"target_modules": [BOMB]}, "target_modules is "),
    "exclusions that backtrack": ({"exclude_modules": BOMB}, "exclude_modules is "),
    "layers that backtrack": ({"layers_to_transform": [0], "layers_pattern": [BOMB]}, "layers_pattern is "),
    "ranks by patterns": ({"rank_pattern": {BOMB: 4}}, "rank_pattern is "),
    "alphas by patterns": ({"alpha_pattern": {BOMB: 4}}, "alpha_pattern is "),
    "saved by patterns": ({"modules_to_save": [BOMB]}, "modules_to_save is "),
    "more patterns than are kept": ({"rank_pattern": {f"l{i}": 4 for i in range(600)}}, "rank_pattern is "),
    "names without end": ({"target_modules": ["q_proj"] * 3000}, "target_modules is "),
    "a rank beyond bounds": ({"r": 100_000}, "r is 100000; expected a whole number from 1 to 4096"),
    "a rank of a pattern": ({"rank_pattern": {"q_proj": 100_000}}, "rank_pattern is "),
    "a rank that is true": ({"r": True}, "r is True"),
    "a rank of none": ({"r": None}, "r is None"),
    "an alpha that is text": ({"lora_alpha": "8"}, "lora_alpha is '8'"),
    "a start that changes the base": ({"init_lora_weights": "pissa_niter_9999999"}, "init_lora_weights is "),
    "a file to read": (
        {"init_lora_weights": "corda", "corda_config": {"covariance_file": "/etc/passwd"}},
        "init_lora_weights is 'corda'",
    ),
    "a file to read, alone": ({"corda_config": {"cache_file": "/etc/passwd"}}, "corda_config is "),
    "a revision": ({"revision": "evil"}, "revision is 'evil'"),
    "parameters": ({"target_parameters": ["q_proj.weight"]}, "target_parameters is "),
    "what nobody knows yet": ({"run_this": "evil"}, "run_this is 'evil'"),
    "a name with escapes": ({"\x1b[2J": 1}, r"\\x1b\[2J is 1"),
    "another kind": ({"peft_type": "BOFT"}, "peft_type is 'BOFT'; expected one of FOURIERFT, "),
    "adapters of adapters": ({"peft_type": "XLORA", "adapters": {"0": "evil/repo"}}, "peft_type is 'XLORA'"),
    "a kind that is a list": ({"peft_type": ["LORA"]}, "peft_type is "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_configuration_cannot_ask_for(name, no_peft):
    changes, match = REFUSED[name]
    with pytest.raises(MailboxError, match=f"The mailbox's adapter_config.json cannot be read: {match}"):
        wrap_base(base(), config(**changes))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[" * 50_000,
        b'{"peft_type": "LORA", "r": 1e999}',
        b"[]",
        b'{"r": 4, "r": 5}',
        b"\xff",
        b" " * (MAX_BYTES + 1),
    ],
)
def test_what_is_no_bounded_json(data, no_peft):
    with pytest.raises(MailboxError, match=r"The mailbox's adapter_config\.json (cannot be read|has \d+ bytes)"):
        wrap_base(base(), data)


def test_no_module_is_imported_by_name(monkeypatch):
    """The example of the hostile configuration; the module is there, and would be found."""
    evil = types.ModuleType("megatron.evil")
    monkeypatch.setitem(sys.modules, "megatron", types.ModuleType("megatron"))
    monkeypatch.setitem(sys.modules, "megatron.evil", evil)
    with pytest.raises(MailboxError, match="megatron_config is "):
        wrap_base(base(), config(megatron_config={"x": 1}, megatron_core="megatron.evil"))


def test_what_is_off_or_a_note_does_no_harm():
    """As PEFT writes it, and newer versions of it: each field there, most of them empty."""
    published = json.loads(config_json(make_tiny_model(), "default")) | {
        "auto_mapping": {"base_model_class": "Llama", "parent_library": "evil"},
        "not_there_yet": None,
        "neither_is_this": [],
        "nor_this": False,
    }
    model = wrap_base(base(), json.dumps(published).encode())
    made = model.peft_config["default"]
    assert made.r == 4
    assert made.auto_mapping is None
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 3712


def test_a_newer_peft_s_default_is_harmless_and_nothing_else(monkeypatch):
    monkeypatch.setitem(peft.LoraConfig.__dataclass_fields__, "to_come", dataclasses.field(default=7))
    assert "to_come" not in believed(json.loads(config(to_come=7)))
    for value in (8, [7], "7"):
        with pytest.raises(AdapterMismatchError, match="to_come is "):
            believed(json.loads(config(to_come=value)))


def test_the_base_that_a_configuration_names_is_not_the_adapter_s():
    """PEFT looks that name up, on the Hub or the disk, when the client's Trainer saves a checkpoint."""
    mine = base()
    mine.name_or_path = "mine/base"
    model = wrap_base(mine, config(base_model_name_or_path="evil/repo"))
    assert model.peft_config["default"].base_model_name_or_path == "mine/base"


TOO_LARGE = {
    "lora": {"r": 4096, "target_modules": "all-linear"},
    "lora by a pattern": {
        "rank_pattern": {"v_proj": 4096, "layers.1.self_attn.q_proj": 4096, "q_proj": 4096},
        "r": 4096,
        "target_modules": r".*_proj",
    },
    "vera": {"peft_type": "VERA", "r": 4096, "target_modules": ["q_proj", "lm_head", "gate_proj", "down_proj"]},
    "unilora": {"peft_type": "UNILORA", "theta_d_length": 10_000_000},
    "loha": {"peft_type": "LOHA", "r": 4096, "target_modules": "all-linear"},
    "fourierft": {"peft_type": "FOURIERFT", "r": ..., "n_frequency": 10_000_000},
    "oft": {"peft_type": "OFT", "r": 0, "oft_block_size": 64, "target_modules": "all-linear"},
}


@pytest.mark.parametrize("name", TOO_LARGE)
def test_an_adapter_beyond_its_base_is_refused_before_it_is_made(name, monkeypatch):
    monkeypatch.setattr(size, "_ALWAYS_ALLOWED", 0)
    monkeypatch.setattr(foundation, "get_peft_model", lambda *_: pytest.fail("PEFT was asked to make it"))
    small = base()
    with pytest.raises(MailboxError, match=r"asks for about [\d,]+ numbers on this base model of [\d,]+"):
        wrap_base(small, config(**TOO_LARGE[name]))


def test_four_hundred_bytes_cost_no_memory():
    def hostile():
        for rank in (100_000, 4096):
            data = config(r=rank, target_modules="all-linear")
            assert len(data) < 436
            with pytest.raises(MailboxError, match=r"r is 100000|asks for about 4,588,096 numbers"):
                wrap_base(base(), data)

    assert peak_bytes(hostile) < 20_000_000


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_are_counted_before_they_are_there(kind):
    """At least as many as PEFT then holds, frozen projections and indices included, and not many times more."""
    made = KINDS[kind]()
    counted = size.count_numbers(base(), made)
    model = base()
    before = numbers_of(model)
    held = numbers_of(get_peft_model(model, made)) - before
    assert held <= counted <= 4 * held + 4096
    if kind == "lora":
        assert counted == held + 2 * (32 + 16)  # room for DoRA's magnitudes


def test_whole_modules_are_counted_each():
    made = peft.LoraConfig(r=1, target_modules=["q_proj"], modules_to_save=["model", "norm"])
    assert size.count_numbers(base(), made) > sum(p.numel() for p in base().parameters())


PATTERNS = {
    r".*\.(q_proj|v_proj)": ["q_proj", "v_proj"],
    r"model\.layers\.\d+\.self_attn\.(?:q|k|v|o)_proj": ["q_proj", "k_proj", "v_proj", "o_proj"],
    r"^model\.layers\.([0-9]|1[0-9])\.mlp\.down_proj$": ["down_proj"],
    r".*(self_attn|mlp)\..*(q_proj|up_proj)": ["q_proj", "up_proj"],
    r".*q_proj|.*k_proj": ["q_proj", "k_proj"],
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_that_people_write_still_work(pattern):
    by_pattern = wrap_base(base(), config(target_modules=pattern))
    by_name = wrap_base(base(), config(target_modules=PATTERNS[pattern]))
    assert [name for name, _ in by_pattern.named_parameters()] == [name for name, _ in by_name.named_parameters()]


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+b", "(.*)*", "(a|b)*", "(a|b)?", "(a(b|c))", "(?=a)", "(?!a)b", "(?i)a", "(?P<n>a)", r"(a)\1", "a{1000}",
        "(l|la)" * 20, "(.|..)" * 20, "a?" * 40, ".*" * 4, ".*?.*?.*?.*?", "[^a]*", "[z-a]", "[]", "(a", "a)", "a**",
        "a++", r"\w*", r"\b", "é", "x" * 501, "|".join([".*a.*b.*c"] * 3),
    ],
)  # fmt: skip
def test_patterns_beyond_the_grammar(pattern):
    assert not is_bounded(pattern)


def test_founding_refuses_what_no_client_joins(tmp_path):
    model = make_tiny_model()
    model.peft_config["default"].layer_replication = [[0, 2], [0, 2]]
    with pytest.raises(
        AdapterMismatchError,
        match=r"Nobody else would load an adapter with this configuration\. It cannot be read: layer_replication is ",
    ):
        config_json(model, "default")
    box = FolderMailbox(tmp_path / "box", durable=False)
    with pytest.raises(
        AdapterMismatchError,
        match=r"Nobody else would load an adapter with this configuration\. It cannot be read: r is 5000",
    ):
        found_federation(box, make_spec(), adapter_file.dump(initial_state()), config(r=5000))
    assert box.head() is None


def test_every_kind_that_is_federated_is_believed():
    for make in KINDS.values():
        fields = json.loads(config_json(get_peft_model(base(), make()), "default"))
        assert believed(fields)["peft_type"] == fields["peft_type"]
        assert torch.is_tensor(next(wrap_base(base(), json.dumps(fields).encode()).parameters()))


@pytest.mark.parametrize("probe", ["x", {"a": 1}, [[1.0]] * 16, [1e39] * 16, [True] * 16, [0.0] * 15, None])
def test_a_fingerprint_that_is_none_is_another_base(probe):
    mine = base_fingerprint(get_peft_model(base(), peft.LoraConfig(target_modules=["q_proj"])))
    check_same_base(mine, dict(mine), "mine")
    with pytest.raises(AdapterMismatchError, match="its embeddings differ"):
        check_same_base(mine, mine | {"embedding_probe": probe}, "mine")


def test_names_and_values_of_others_are_shown_as_visible_text():
    with pytest.raises(AdapterMismatchError) as refused:
        check_same_base({}, {"\x1b[2J": "\x1b]0;evil\x07" * 100}, "\x1b[31m")
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 400
    with pytest.raises(AdapterMismatchError) as refused:
        check_same_adapter({"peft_type": "LORA"}, {"peft_type": "LORA", "bias": "\x1b[2J" * 1000})
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 600
