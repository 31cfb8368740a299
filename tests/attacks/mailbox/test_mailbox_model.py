"""A base model that a mailbox names: no path of the client's machine, no code, no pickled weights."""

import ast
import json
from pathlib import Path

import pytest
import torch
import transformers
from tiny_workload import make_model

import fedfstq_hf
from fedfstq_hf.errors import ConfigError
from fedfstq_hf.running import foundation


@pytest.mark.parametrize(
    "name",
    [
        "/srv/models/private",
        "./model",
        "../model",
        "~/model",
        "a/../b",
        "a\\b",
        "C:\\x",
        "a/b/c",
        "",
        "org/",
        "-x",
        "\x1b[2J",
    ],
)
def test_a_mailbox_names_no_path(name, monkeypatch):
    monkeypatch.setattr(foundation, "_load", lambda *args, **options: pytest.fail("loaded"))
    with pytest.raises(ConfigError, match=r"is no Hub id\. Name the base model yourself: type --model") as error:
        foundation.load_shared_base(name, "float32")
    assert "\x1b" not in str(error.value)


@pytest.mark.parametrize("name", ["model", "shared/model"])
def test_a_folder_that_looks_like_a_hub_id_is_not_for_a_mailbox_to_choose(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / name)
    with pytest.raises(ConfigError, match=rf"names its base model '{name}', and here that is a path"):
        foundation.load_shared_base(name, "float32")
    assert foundation.load_base(name, "float32")[0].config.model_type == "llama"  # its owner may


@pytest.fixture
def repo(tmp_path, monkeypatch):
    """The folder that stands for the Hub's repo evil/base."""
    make_model(tmp_path / "repo")
    monkeypatch.setattr(foundation, "resolve_model", lambda name: str(tmp_path / "repo"))
    return tmp_path / "repo"


def change(file, **fields):
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_plain_weights_load(repo):
    model, tokenizer = foundation.load_shared_base("evil/base", "float32")
    assert (model.config.hidden_size, tokenizer.pad_token) == (16, "<pad>")
    assert foundation.load_shared_base("demo", "float32")[0].config.hidden_size == 16


def test_pickled_weights_are_refused(repo):
    model = transformers.AutoModelForCausalLM.from_pretrained(repo)
    torch.save(model.state_dict(), repo / "pytorch_model.bin")
    (repo / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="cannot be loaded"):
        foundation.load_shared_base("evil/base", "float32")


@pytest.mark.parametrize("own", [True, False])
def test_code_in_the_repo_is_not_run(repo, own, tmp_path):
    canary = tmp_path / "ran"
    (repo / "evil.py").write_text(f"open({str(canary)!r}, 'w')\n")
    change(repo / "config.json", model_type="evil", auto_map={"AutoConfig": "evil.A", "AutoModelForCausalLM": "evil.B"})
    change(repo / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.C", None]}, tokenizer_class="C")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        (foundation.load_base if own else foundation.load_shared_base)("evil/base", "float32")
    assert not canary.exists()


def test_a_kernel_in_the_config_is_not_fetched(repo, monkeypatch):
    asked = []
    monkeypatch.setattr("transformers.integrations.hub_kernels.get_kernel", lambda *a, **k: asked.append(a))
    change(repo / "config.json", attn_implementation="evil/kernel")
    model, _ = foundation.load_shared_base("evil/base", "float32")
    assert model.config._attn_implementation in ("sdpa", "eager")
    assert asked == []


def test_an_adapter_in_the_place_of_a_base_is_refused(repo):
    (repo / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/srv/models/private"}))
    with pytest.raises(ConfigError, match="it is an adapter, which names another base"):
        foundation.load_shared_base("evil/base", "float32")


def test_whatever_a_repo_makes_transformers_raise_is_one_kind_of_error(repo):
    change(repo / "config.json", hidden_size="x" * 10_000)
    with pytest.raises(ConfigError, match="cannot be loaded") as error:
        foundation.load_shared_base("evil/base", "float32")
    assert len(str(error.value)) < 2000


def test_every_load_in_the_package_says_that_no_remote_code_is_run():
    loaders, silent = 0, []
    for path in Path(fedfstq_hf.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            owner = node.func.value
            if (
                node.func.attr != "from_pretrained"
                or not isinstance(owner, ast.Name)
                or not owner.id.startswith("Auto")
            ):
                continue
            loaders += 1
            trusted = {item.arg: getattr(item.value, "value", None) for item in node.keywords}
            if trusted.get("trust_remote_code") is not False:
                silent.append(f"{path}:{node.lineno}")
    assert loaders >= 6
    assert silent == []
