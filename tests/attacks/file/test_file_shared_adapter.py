"""Folders of adapters that a stranger made: compressed ones to load, trained ones to compress."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from fedfstq_hf import load_compressed_adapter
from fedfstq_hf.errors import AdapterMismatchError, FedFSTQError, MessageError
from fedfstq_hf.sharing import hub as expanding
from fedfstq_hf.sharing.compress import compress_adapter
from fedfstq_hf.sharing.packed import EXACT_FILE, FACTS_FILE
from fedfstq_hf.sharing.trained import CONFIG_FILE, WEIGHTS_FILE
from tests.attacks.peak import peak_bytes
from tests.sharing.conftest import fresh_base, trained

BOMB = r"(([a-z_.]+)+)+\d!"


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A compressed adapter with magnitudes, which are kept exactly."""
    folder = tmp_path_factory.mktemp("shared") / "small"
    compress_adapter(trained(use_dora=True), 8000).save(folder)
    return folder


@pytest.fixture
def folder(shared, tmp_path):
    copy = tmp_path / "small"
    copy.mkdir()
    for file in shared.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def forge(folder, name: str, data: bytes) -> None:
    """Another file, of which the facts say the right digest."""
    facts = json.loads((folder / FACTS_FILE).read_bytes())
    facts["sha256"][name] = hashlib.sha256(data).hexdigest()
    (folder / name).write_bytes(data)
    (folder / FACTS_FILE).write_text(json.dumps(facts))


def reconfigure(folder, **changes) -> None:
    fields = json.loads((folder / CONFIG_FILE).read_bytes()) | changes
    forge(folder, CONFIG_FILE, json.dumps(fields).encode())


HOSTILE = {
    "code by name": {"megatron_config": {"a": 1}, "megatron_core": "evil"},
    "layers again and again": {"layer_replication": [[0, 2]] * 2000},
    "a pattern that backtracks": {"target_modules": BOMB},
    "a rank beyond bounds": {"r": 100_000},
    "a rank that fits no base": {"r": 4096},
    "whole models": {"modules_to_save": ["model", "s"]},
    "another kind": {"peft_type": "VERA"},
    "a file to read": {"corda_config": {"covariance_file": "/etc/passwd"}},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_shared_configuration_is_refused_before_anything_is_made(folder, name, monkeypatch):
    reconfigure(folder, **HOSTILE[name])
    base = fresh_base()
    monkeypatch.setattr(expanding, "get_peft_model", lambda *_: pytest.fail("PEFT was asked to make it"))
    if name == "whole models":
        monkeypatch.setattr("fedfstq_hf.adapters.size._ALWAYS_ALLOWED", 0)
    with pytest.raises(FedFSTQError, match=r"adapter_config\.json cannot be read: |asks for about [\d,]+ numbers"):
        load_compressed_adapter(base, folder)
    assert not [module for module in base.modules() if hasattr(module, "lora_A")]


def test_four_hundred_bytes_cost_no_memory(folder):
    base = fresh_base()

    def hostile():
        for rank in (100_000, 4096):
            reconfigure(folder, r=rank)
            with pytest.raises(FedFSTQError, match=r"r is 100000|asks for about 3,\d+,\d+ numbers"):
                load_compressed_adapter(base, folder)

    assert peak_bytes(hostile) < 20_000_000


@pytest.mark.parametrize(
    "facts",
    [
        b"[" * 100_000,
        b'{"format": 1, "format": 1}',
        b'{"format": 1, "num_params": 1e999}',
        b'{"format": 1, "seed": ' + b"9" * 5000 + b"}",
        b"{" + b'"a": 1, ' * 100_000 + b'"b": 1}',
        b'{"format": 1}',
        b"null",
        b"\xff\xfe",
    ],
)
def test_facts_that_are_none(folder, facts):
    (folder / FACTS_FILE).write_bytes(facts)
    with pytest.raises(MessageError, match=FACTS_FILE):
        load_compressed_adapter(fresh_base(), folder)


def test_what_facts_say_is_shown_as_visible_text(folder):
    facts = json.loads((folder / FACTS_FILE).read_bytes())
    (folder / FACTS_FILE).write_text(json.dumps(facts | {"base": {"\x1b[2J" * 50: "\x1b[31m" * 50}}))
    with pytest.raises(AdapterMismatchError) as refused:
        load_compressed_adapter(fresh_base(), folder)
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 500


def test_exact_tensors_are_bounded_by_those_of_the_adapter(folder):
    header = json.dumps({f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(200)}).encode()
    forge(folder, EXACT_FILE, struct.pack("<Q", len(header)) + header)
    with pytest.raises(MessageError, match=f"{EXACT_FILE} has a tensor without numbers"):
        load_compressed_adapter(fresh_base(), folder)
    forge(folder, EXACT_FILE, struct.pack("<Q", 1 << 40) + bytes(100))
    with pytest.raises(MessageError, match=r"bytes of names and shapes; expected at most \d{4,5}\."):
        load_compressed_adapter(fresh_base(), folder)


@pytest.fixture
def adapter(tmp_path):
    trained().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_link_out_of_a_folder_is_not_followed(adapter, tmp_path, name):
    """The file that it leads to would be read, and published in what is made of it."""
    (tmp_path / "private").write_bytes((adapter / name).read_bytes())
    (adapter / name).unlink()
    (adapter / name).symlink_to(tmp_path / "private")
    with pytest.raises(AdapterMismatchError, match=r"is a link to .*private, outside of the folder"):
        compress_adapter(adapter, "12bpp", base_model=fresh_base())
    (adapter / name).unlink()
    (adapter / name).symlink_to("../private")
    with pytest.raises(AdapterMismatchError, match="outside of the folder"):
        compress_adapter(adapter, "12bpp", base_model=fresh_base())


def test_links_and_pipes_in_a_compressed_adapter(folder, tmp_path):
    (tmp_path / "private").write_bytes((folder / CONFIG_FILE).read_bytes())
    (folder / CONFIG_FILE).unlink()
    (folder / CONFIG_FILE).symlink_to(tmp_path / "private")
    with pytest.raises(MessageError, match="outside of the folder"):
        load_compressed_adapter(fresh_base(), folder)
    (folder / FACTS_FILE).unlink()
    (folder / FACTS_FILE).symlink_to(FACTS_FILE)  # in a circle
    with pytest.raises(MessageError, match="cannot be read"):
        load_compressed_adapter(fresh_base(), folder)
    (folder / FACTS_FILE).unlink()
    os.mkfifo(folder / FACTS_FILE)  # reading it would wait for ever
    with pytest.raises(MessageError, match="cannot be read"):
        load_compressed_adapter(fresh_base(), folder)


def test_links_within_a_folder_and_the_hub_s_cache_are_followed(adapter, tmp_path):
    (adapter / CONFIG_FILE).rename(adapter / "kept.json")
    (adapter / CONFIG_FILE).symlink_to("kept.json")
    expected = compress_adapter(adapter, "12bpp", base_model=fresh_base()).files
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "c0ffee", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        (blobs / name[:9]).write_bytes((adapter / name).read_bytes())
        (snapshot / name).symlink_to(f"../../blobs/{name[:9]}")
    assert compress_adapter(snapshot, "12bpp", base_model=fresh_base()).files == expected


@pytest.mark.parametrize("name", [name for name in HOSTILE if name != "whole models"])
def test_a_trained_adapter_s_configuration_is_refused_before_it_is_loaded(adapter, name, monkeypatch):
    fields = json.loads((adapter / CONFIG_FILE).read_bytes()) | HOSTILE[name]
    (adapter / CONFIG_FILE).write_text(json.dumps(fields))
    base = fresh_base()
    monkeypatch.setattr("peft.PeftModel.from_pretrained", lambda *_, **__: pytest.fail("PEFT was asked to load it"))
    refused = r"adapter_config\.json cannot be read: |asks for about|The adapter sets layer_replication"
    with pytest.raises(AdapterMismatchError, match=refused):
        compress_adapter(adapter, "12bpp", base_model=base)


def test_weights_of_empty_tensors_are_refused_unread(adapter):
    (adapter / WEIGHTS_FILE).write_bytes(struct.pack("<Q", 90_000_000) + b"{")
    with pytest.raises(AdapterMismatchError, match="90000000 bytes of names and shapes; expected at most 8388608"):
        compress_adapter(adapter, "12bpp", base_model=fresh_base())


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_pickled_adapter_runs_no_code(adapter, tmp_path):
    (adapter / WEIGHTS_FILE).unlink()
    torch.save({"base_model.model.a.lora_A.weight": Touch(tmp_path / "ran")}, adapter / "adapter_model.bin")
    with pytest.raises(AdapterMismatchError, match=r"adapter_model\.bin cannot be read"):
        compress_adapter(adapter, "12bpp", base_model=fresh_base())
    assert not (tmp_path / "ran").exists()


def test_a_forged_configuration_is_not_expanded_either(folder, tmp_path):
    (folder / CONFIG_FILE).write_bytes((folder / CONFIG_FILE).read_bytes().replace(b'"r":4', b'"r":3'))
    with pytest.raises(MessageError, match=r"adapter_config\.json has sha256"):
        expanding.expand_adapter(folder, tmp_path / "plain", base_model="demo")


def test_how_an_adapter_started_is_still_known(adapter):
    """Its numbers are loaded whatever it started from; a seed of another start is refused as before."""
    fields = json.loads((adapter / CONFIG_FILE).read_bytes())
    (adapter / CONFIG_FILE).write_text(json.dumps(fields | {"init_lora_weights": "gaussian"}))
    with pytest.raises(AdapterMismatchError, match="its init_lora_weights is 'gaussian'"):
        compress_adapter(adapter, "12bpp", base_model=fresh_base(), init_seed=1)


def test_nobody_shares_what_nobody_loads():
    model = trained()
    model.peft_config["default"].megatron_config = {"a": 1}
    assert isinstance(model.peft_config["default"], LoraConfig)
    with pytest.raises(AdapterMismatchError, match=r"Nobody else would load .*megatron_config is "):
        compress_adapter(model, "12bpp")
