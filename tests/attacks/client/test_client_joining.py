"""What one client attached makes the joining fail: the others' are joined, and the round closes."""

import json
import struct

import pytest
import torch
from light import found
from light_updates import ones, post
from safetensors.torch import save

from fedfstq_hf.errors import DataError, MailboxError, MessageError
from fedfstq_hf.federation.server.attachments import join_apart
from fedfstq_hf.federation.server.coordinator import Coordinator
from fedfstq_hf.generation.saliency import FILE_NAME, Saliency, pack, unpack
from fedfstq_hf.generation.shared_saliency import join_saliency

pytestmark = pytest.mark.timeout(20)

TABLE = Saliency(torch.arange(8.0), torch.full((8,), 3, dtype=torch.uint8), "t" * 64)
TENSORS = {"scores": torch.zeros(8, dtype=torch.uint8), "levels": torch.zeros(2, dtype=torch.uint8)}
FIELDS = {"base": {}, "format": 1, "high": 1.0, "low": 0.0, "tokenizer": "t" * 64, "vocab_size": 8}


def file(tensors=TENSORS, **fields):
    return save(tensors, metadata={"saliency": json.dumps(FIELDS | fields)})


def raw(header):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text


HOSTILE = {
    "empty": b"",
    "noise": bytes(range(256)),
    "deep header": raw(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "deep metadata": save(TENSORS, metadata={"saliency": "[" * 100_000 + "]" * 100_000}),
    "deep base": save(TENSORS, metadata={"saliency": '{"base": {"x": ' + "[" * 5000 + "]" * 5000 + "}}"}),
    "nan": file(low=float("nan")),
    "infinite": file(high=float("inf")),
    "overflow": file(
        low=-1e308, high=1e308, base={}, tensors=TENSORS | {"levels": torch.full((2,), 255, dtype=torch.uint8)}
    ),
    "digits": save(TENSORS, metadata={"saliency": json.dumps(FIELDS).replace("8}", "9" * 5000 + "}")}),
    "wrong dtype": file({**TENSORS, "scores": torch.full((8,), float("nan"))}),
    "negative": file(vocab_size=-1),
    "probe of another layer": file({**TENSORS, "probe": torch.zeros(4).half()}, probe_layer=10**9),
    "no metadata": save(TENSORS),
    "base is a list of pairs": file(base=[[["a"], 1]]),
    "another tokenizer": file(tokenizer="u" * 64),
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_the_others_are_joined(data):
    expected = unpack(join_saliency([(pack(TABLE), 0.5)] * 3)[FILE_NAME])
    joined = join_apart(join_saliency, [(pack(TABLE), 0.5), (data, 0.5), *[(pack(TABLE), 0.5)] * 2])
    assert torch.equal(unpack(joined[FILE_NAME]).scores(), expected.scores())


@pytest.mark.parametrize("error", [RecursionError("deep"), ValueError("odd"), KeyError("x"), MemoryError()])
def test_whatever_breaks_the_joining_is_left_out(error, caplog):
    def join(files):
        if any(data == b"x" for data, _ in files):
            raise error
        return {"joined": b"+".join(data for data, _ in files)}

    files = [(b"a", 1.0), (b"x", 1.0), (b"b", 1.0)]
    assert join_apart(join, files) == {"joined": b"a+b"}
    assert "Attachment number 2 is left out" in caplog.text
    assert join_apart(join, [(b"x", 1.0)]) == {}


def test_what_only_breaks_together_is_not_published(caplog):
    def join(files):
        if len(files) > 1:
            raise ValueError("odd \x1b[31m")
        return {"joined": files[0][0]}

    assert join_apart(join, [(b"a", 1.0), (b"b", 1.0)]) == {}
    assert "No token sensitivities are published" in caplog.text
    assert "\x1b" not in caplog.text


def test_a_refusal_to_publish_is_passed_on():
    def join(files):
        raise DataError("one client alone")

    with pytest.raises(DataError, match="one client alone"):
        join_apart(join, [(b"a", 1.0)])


def test_one_alone_may_be_too_few_and_is_no_culprit():
    def join(files):
        if any(data == b"x" for data, _ in files):
            raise ValueError("odd")
        if len(files) < 2:
            raise DataError("one client alone")
        return {"joined": b"+".join(data for data, _ in files)}

    assert join_apart(join, [(b"a", 1.0), (b"x", 1.0), (b"b", 1.0)]) == {"joined": b"a+b"}


@pytest.mark.parametrize("error", [MailboxError("its repo is gone"), MessageError("too large")])
def test_what_cannot_be_read_is_left_out(tmp_path, monkeypatch, error, caplog):
    mailbox = found(tmp_path, rounds=1, share_saliency=True)

    def read(client, name, *, max_bytes):
        if client == "x":
            raise error

    monkeypatch.setattr(mailbox, "read_attachment", read)
    for name in "abx":
        post(mailbox, name, ones(1))
    record = Coordinator(mailbox, saliency=join_saliency).close_round()
    assert (record.finished, len(record.accepted)) == (True, 3)
    assert f"The attachment of client x is left out: {error}" in caplog.text
