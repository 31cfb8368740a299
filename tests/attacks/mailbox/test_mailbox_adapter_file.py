"""A mailbox's adapter_model.safetensors: sizes, names, types and numbers that are not the federation's."""

from __future__ import annotations

import hashlib
import json
import struct

import pytest
import torch

from fedfstq_hf.errors import MailboxError
from fedfstq_hf.federation import adapter_file
from fedfstq_hf.federation.mailbox.folder import FolderMailbox
from fedfstq_hf.federation.mailbox.protocol import ADAPTER_FILE, RECORD_FILE
from fedfstq_hf.federation.record import RoundRecord
from tests.attacks.peak import peak_bytes
from tests.federation.light import SCHEMA, LightClient, found, initial_state

A = "layer.lora_A.weight"


def file_of(header: object, payload: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + payload


def with_one(**changes: torch.Tensor) -> bytes:
    return adapter_file.dump(initial_state() | {name.replace("__", "."): t for name, t in changes.items()})


def damaged(value: float) -> bytes:
    state = initial_state()
    state[A][1, 2] = value
    return adapter_file.dump(state)


MANY_EMPTY = {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(20_000)}
HOSTILE = {
    "nothing": b"",
    "a header of 2**63 bytes": struct.pack("<Q", 2**63) + b"{}",
    "a deep header": file_of(b"[" * 2000),
    "a shape beyond the file": file_of({A: {"dtype": "F32", "shape": [1 << 40, 4], "data_offsets": [0, 1 << 44]}}),
    "a shape that overflows": file_of({A: {"dtype": "F32", "shape": [1 << 62, 16], "data_offsets": [0, 0]}}),
    "an empty shape that overflows": file_of({A: {"dtype": "F32", "shape": [0, 1 << 63], "data_offsets": [0, 0]}}),
    "a type nobody has": file_of({A: {"dtype": "F8_E8M0", "shape": [4], "data_offsets": [0, 4]}}, b"\0" * 4),
    "empty tensors by the thousand": file_of(MANY_EMPTY),
    "one tensor more": with_one(more=torch.ones(1)),
    "one tensor less": adapter_file.dump({A: initial_state()[A]}),
    "another shape": adapter_file.dump(initial_state() | {A: torch.ones(8, 12)}),
    "another type": adapter_file.dump({name: tensor.double() for name, tensor in initial_state().items()}),
    "whole numbers": adapter_file.dump(initial_state() | {A: torch.ones(4, 24, dtype=torch.int32)}),
    "NaN": damaged(float("nan")),
    "infinity": damaged(float("inf")),
    "a name with escapes": adapter_file.dump(initial_state() | {"\x1b[2J" * 60: torch.ones(1)}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_an_adapter_that_is_not_the_federation_s(name):
    with pytest.raises(MailboxError) as refused:
        adapter_file.load(HOSTILE[name], schema=SCHEMA)
    assert str(refused.value).startswith("The adapter file ")
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize("name", ["NaN", "infinity", "empty tensors by the thousand", "whole numbers"])
def test_without_knowing_the_adapter(name):
    with pytest.raises(MailboxError, match=r"NaN or infinity in 'layer|without numbers, 't0'|expected floating point"):
        adapter_file.load(HOSTILE[name])


def test_the_difference_is_named():
    with pytest.raises(MailboxError, match=r"'layer\.lora_A\.weight' is float32 \(8, 12\); expected float32 \(4, 24\)"):
        adapter_file.load(HOSTILE["another shape"], schema=SCHEMA)
    with pytest.raises(MailboxError, match=r"'more' is float32 \(1,\); expected no such tensor"):
        adapter_file.load(HOSTILE["one tensor more"], schema=SCHEMA)


def test_empty_tensors_cost_no_memory():
    many = {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(200_000)}
    data = file_of(many)
    del many

    def hostile():
        for schema in (SCHEMA, None):
            with pytest.raises(MailboxError, match=r"bytes of names and shapes; expected at most \d+"):
                adapter_file.load(data, schema=schema)

    assert peak_bytes(hostile) < 20_000_000


@pytest.mark.parametrize("name", ["NaN", "another type", "one tensor more"])
def test_a_client_does_not_begin_a_round_with_it(tmp_path, name):
    """The mailbox's record fits its file: nothing is damaged, it was published like this."""
    box = found(tmp_path / "box")
    folder = tmp_path / "box" / "rounds" / "000000"
    data = HOSTILE[name]
    (folder / ADAPTER_FILE).write_bytes(data)
    record = json.loads((folder / RECORD_FILE).read_bytes())
    record |= {"adapter_sha256": hashlib.sha256(data).hexdigest(), "adapter_bytes": len(data)}
    (folder / RECORD_FILE).write_text(json.dumps(record))
    assert RoundRecord.from_json((folder / RECORD_FILE).read_bytes()).round == 0
    client = LightClient(FolderMailbox(box.path, durable=False), "a", tmp_path / "a")
    with pytest.raises(MailboxError, match="The adapter file "):
        client.participation.next()
