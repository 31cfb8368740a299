"""Saliency files that a stranger made, and the repos that they lie in."""

from __future__ import annotations

import json
import struct

import pytest
import torch
import transformers
from safetensors.torch import save

from fedfstq_hf.demo import load_tokenizer
from fedfstq_hf.errors import AdapterMismatchError, ConfigError, DataError, MessageError
from fedfstq_hf.generation import published
from fedfstq_hf.generation.saliency import FILE_NAME, MAX_BYTES, Saliency, pack, unpack
from fedfstq_hf.generation.shared_saliency import join_saliency
from tests.attacks.peak import peak_bytes

FIELDS = {"base": {}, "format": 1, "high": 3.0, "low": 1.0, "tokenizer": "t", "vocab_size": 3}


def forged(text: str | None = None, probe: torch.Tensor | None = None, **changes) -> bytes:
    tensors = {"levels": torch.full((1,), 21, dtype=torch.uint8), "scores": torch.zeros(3, dtype=torch.uint8)}
    if probe is not None:
        tensors["probe"] = probe
    return save(tensors, metadata={"saliency": json.dumps(FIELDS | changes) if text is None else text})


HOSTILE = {
    "nested without end": forged("[" * 5000),
    "a key twice": forged('{"format": 1, "format": 1}'),
    "a number of five thousand digits": forged('{"format": ' + "9" * 5000 + "}"),
    "no object": forged("[]"),
    "NaN": forged(low=float("nan")),
    "scores that are infinite in single precision": forged(high=1e300),
    "scores that differ by more than numbers do": forged(low=-1e308, high=1e308),
    "a size that is text": forged(vocab_size="3"),
    "a size that is true": forged(vocab_size=True),
    "a size beyond the file": forged(vocab_size=MAX_BYTES),
    "a base that is a list": forged(base=[["a", 1]]),
    "a tokenizer that is a list": forged(tokenizer=["t"]),
    "a tokenizer without end": forged(tokenizer="t" * 10_000),
    "a layer beyond any model": forged(probe=torch.zeros(2).half(), probe_layer=10**9),
    "a layer that is a fraction": forged(probe=torch.zeros(2).half(), probe_layer=1.5),
    "a bias beyond bounds": forged(probe=torch.zeros(2).half(), probe_bias=1e308),
    "a probe of NaN": forged(probe=torch.full((2,), torch.nan).half()),
    "a probe of nothing": forged(probe=torch.zeros(0).half()),
    "a header without end": struct.pack("<Q", 1 << 40) + bytes(50),
    "a longer text than a table has": forged(json.dumps(FIELDS | {"more": "x" * 40_000})),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_table_that_is_none(name):
    assert unpack(forged()).levels.tolist() == [1, 1, 1]
    with pytest.raises(MessageError, match=r"saliency\.safetensors"):
        unpack(HOSTILE[name])


def test_what_a_table_says_is_shown_as_visible_text():
    for data in (forged(tokenizer={"\x1b[2J": "\x1b[31m" * 99}), forged(format="\x1b[2J")):
        with pytest.raises(MessageError) as refused:
            unpack(data)
        assert str(refused.value).isprintable()
        assert len(str(refused.value)) < 300


def test_a_client_s_table_that_is_none_is_left_out_of_the_others_():
    good = pack(Saliency(torch.tensor([1.0, 2.0]), torch.tensor([1, 1], dtype=torch.uint8), "t"))
    alone = join_saliency([(good, 1.0)] * 3)
    assert FILE_NAME in alone
    assert join_saliency([(data, 1.0) for data in HOSTILE.values()] + [(good, 1.0)] * 3) == alone
    with pytest.raises(DataError, match=f"of 0 clients are usable, out of {len(HOSTILE)} that were sent"):
        join_saliency([(data, 1.0) for data in HOSTILE.values()])


def test_empty_tensors_cost_no_memory():
    header = json.dumps({f"t{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(200_000)})
    data = struct.pack("<Q", len(header)) + header.encode()
    assert len(data) < MAX_BYTES
    del header

    def hostile():
        with pytest.raises(MessageError, match="bytes of names and shapes"):
            unpack(data)

    assert peak_bytes(hostile) < 10_000_000


def test_a_link_out_of_a_folder_is_not_followed(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "private").write_bytes(forged())
    (tmp_path / "adapter" / FILE_NAME).symlink_to("../private")
    with pytest.raises(ConfigError, match="outside of the folder"):
        published.published_scorer(str(tmp_path / "adapter"), load_tokenizer())


def test_a_table_larger_than_any_is_not_read_whole(tmp_path):
    with (tmp_path / FILE_NAME).open("wb") as file:
        file.truncate(200_000_000)

    def hostile():
        with pytest.raises(MessageError, match=f"has {MAX_BYTES + 1} bytes"):
            published.published_scorer(str(tmp_path), load_tokenizer())

    assert peak_bytes(hostile) < 60_000_000


@pytest.mark.parametrize("config", [b"[" * 100_000, b'{"a": NaN}', b"[]", b"\xff"])
def test_a_configuration_beside_it_that_is_none(tmp_path, config):
    (tmp_path / "adapter_config.json").write_bytes(config)
    with pytest.raises(AdapterMismatchError, match=r"adapter_config\.json of .* cannot be read"):
        published.published_tokenizer(str(tmp_path))


@pytest.mark.parametrize("named", ["/etc", "../private", "folder", ["a/b"], 7, "a/b/c", "https://evil"])
def test_a_repo_of_the_hub_names_no_folder_of_this_machine(tmp_path, monkeypatch, named):
    """Its base model's tokenizer would be looked for there; another repo of the Hub is looked up as before."""
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(
        transformers.AutoTokenizer, "from_pretrained", lambda name, **how: asked.append((name, how)) or "a tokenizer"
    )

    def downloaded(repo, name):
        (tmp_path / name).write_text(json.dumps({"base_model_name_or_path": content}))
        return tmp_path / name if name == "adapter_config.json" else None

    monkeypatch.setattr(published, "published_file", downloaded)
    content = named
    assert published.published_tokenizer("org/adapter") is None
    assert asked == []
    content = "org/base"
    assert published.published_tokenizer("org/adapter") == "a tokenizer"
    assert asked == [("org/base", {"trust_remote_code": False})]
