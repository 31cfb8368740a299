"""Hostile containers: each is a working message but for one thing, most with a digest valid for what they say."""

import base64
import hashlib
import json

import pytest

from fedfstq_hf.codec import message
from fedfstq_hf.errors import MessageError
from fedfstq_hf.federation import keys

FIELDS = [1, 3, 10, "mallory", "fp32", {}]
HASHES = bytes(32) + bytes(range(32))
PAYLOAD = b"0123456789abcdef"


def meta(fields=FIELDS, hashes=HASHES, payload=PAYLOAD, extra=b""):
    """Metadata of any fields, with the digest that the format asks for: a client has all it takes to make it."""
    head = json.dumps(fields, separators=(",", ":"), sort_keys=True)
    digest = hashlib.sha256(b"fedfstq message\n" + head.encode() + hashes + payload).digest()
    sealed = base64.b85encode(hashes + digest + extra).decode()
    return f"{head[:-1]},{json.dumps(sealed)}]"


def frame(text, payload=PAYLOAD, length=None):
    data = text.encode() if isinstance(text, str) else text
    return (len(data) if length is None else length).to_bytes(8, "little") + data + payload


def header(metadata=None, size=16, tensors=None, keys_=None):
    tensors = tensors or {"payload": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
    return json.dumps({"__metadata__": keys_ or {"fstq": metadata or meta()}, **tensors}, separators=(",", ":"))


def tensor(name="payload", dtype="U8", shape=(16,), offsets=(0, 16)):
    return {name: {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}


def test_the_forger_can_make_a_valid_message():
    opened, payload = message.unpack(frame(header()))
    assert (opened.client_id, opened.codec, payload) == ("mallory", "fp32", PAYLOAD)
    assert frame(header()) == message.pack(opened, PAYLOAD)


DUPLICATE = meta([1, 3, 10, "mallory", "fp32", {}]).replace("{}", '{"a":1,"a":2}')
HOSTILE = {
    # lengths
    "length beyond the file": frame(header(), length=2**63),
    "length one too large": frame(header(), length=len(header()) + 1),
    "length one too small": frame(header(), length=len(header()) - 1),
    "length 0": frame("", b""),
    "length of everything": (2**64 - 1).to_bytes(8, "little") + bytes(100),
    "payload shorter than announced": frame(header(size=17)),
    "payload longer than announced": frame(header(), PAYLOAD + b"!"),
    "payload of an exabyte": frame(header(size=2**60)),
    "shape and offsets disagree": frame(header(tensors=tensor(shape=(17,)))),
    "negative size": frame(header(tensors=tensor(shape=(-16,), offsets=(0, -16)))),
    "size as a float": frame(header(tensors=tensor(shape=(16.0,)))),
    # streams
    "no stream": frame(json.dumps({"__metadata__": {"fstq": meta()}}, separators=(",", ":"))),
    "stream of another name": frame(header(tensors=tensor("update"))),
    "two overlapping streams": frame(header(tensors={**tensor(), **tensor("second")})),
    "two adjacent streams": frame(
        header(tensors={**tensor(shape=(8,), offsets=(0, 8)), **tensor("b", shape=(8,), offsets=(8, 16))})
    ),
    "stream with a hole before it": frame(header(tensors=tensor(shape=(8,), offsets=(8, 16)))),
    "offsets backwards": frame(header(tensors=tensor(offsets=(16, 0)))),
    "stream in two dimensions": frame(header(tensors=tensor(shape=(4, 4)))),
    "stream of floats": frame(header(tensors=tensor(dtype="F32", shape=(4,)))),
    # metadata
    "no metadata": frame(json.dumps(tensor())),
    "metadata of another key": frame(header(keys_={"other": meta()})),
    "a second metadata key": frame(header(keys_={"a": "x", "fstq": meta()})),
    "a thousand metadata keys": frame(header(keys_={**{f"k{i}": "" for i in range(1000)}, "fstq": meta()})),
    "a flood of spaces": frame(header(meta()[:-1] + " " * 600 + "]")),
    "a flood of parameters": frame(header(meta([*FIELDS[:5], {f"p{i}": i for i in range(60)}]))),
    "one long parameter": frame(header(meta([*FIELDS[:5], {"p": "x" * 600}]))),
    "metadata over 512 by escapes": frame(header(meta([*FIELDS[:5], {"p": "é" * 70}]))),
    "metadata is a number": frame(header().replace(json.dumps(meta()), "7")),
    "metadata is an object": frame(header("{}")),
    "metadata is null": frame(header("null")),
    "deep nesting": frame(header("[" * 500)),
    "deep nesting outside": frame("[" * 800),
    "not JSON": frame(b"\xff\xfe" * 40),
    "a byte order mark": frame(b"\xef\xbb\xbf" + header().encode()),
    "duplicate header key": frame(header()[:-1] + "," + json.dumps(tensor(), separators=(",", ":"))[1:]),
    "duplicate parameter": frame(header(DUPLICATE)),
    "parameters out of order": frame(
        header(meta([*FIELDS[:5], {"a": 1, "b": 2}]).replace('"a":1,"b":2', '"b":2,"a":1'))
    ),
    "white space": frame(header(meta().replace(",", ", ", 1))),
    "an escaped letter": frame(header().replace("mallory", "m\\\\u0061llory")),
    # fields, with a valid digest
    "version 0": frame(header(meta([0, *FIELDS[1:]]))),
    "version 2": frame(header(meta([2, *FIELDS[1:]]))),
    "version true": frame(header(meta([True, *FIELDS[1:]]))),
    "version as text": frame(header(meta(["1", *FIELDS[1:]]))),
    "negative round": frame(header(meta([1, -3, *FIELDS[2:]]))),
    "round beyond 2**53": frame(header(meta([1, 2**53, *FIELDS[2:]]))),
    "round of 300 digits": frame(header(meta([1, 10**300, *FIELDS[2:]]))),
    "round as a float": frame(header(meta([1, 3.0, *FIELDS[2:]]))),
    "round true": frame(header(meta([1, True, *FIELDS[2:]]))),
    "examples beyond 2**53": frame(header(meta([1, 3, 2**60, *FIELDS[3:]]))),
    "examples NaN": frame(header(meta([1, 3, float("nan"), *FIELDS[3:]]))),
    "examples infinite": frame(header(meta([1, 3, float("inf"), *FIELDS[3:]]))),
    "client as a path": frame(header(meta([1, 3, 10, "../../spec", *FIELDS[4:]]))),
    "client with a line break": frame(header(meta([1, 3, 10, "a\nb", *FIELDS[4:]]))),
    "client with a NUL": frame(header(meta([1, 3, 10, "a\0", *FIELDS[4:]]))),
    "client of 65 letters": frame(header(meta([1, 3, 10, "a" * 65, *FIELDS[4:]]))),
    "client as a list": frame(header(meta([1, 3, 10, ["mallory"], *FIELDS[4:]]))),
    "client in other digits": frame(header(meta([1, 3, 10, "m٣", *FIELDS[4:]]))),
    "codec as a path": frame(header(meta([*FIELDS[:4], "../fp32", {}]))),
    "codec as a module": frame(header(meta([*FIELDS[:4], "os:system", {}]))),
    "parameters as a list": frame(header(meta([*FIELDS[:5], []]))),
    "parameter NaN": frame(header(meta([*FIELDS[:5], {"a": float("nan")}]))),
    "parameter as a list": frame(header(meta([*FIELDS[:5], {"a": [1]}]))),
    "a field too few": frame(header(meta(FIELDS[:5]))),
    "a field too many": frame(header(meta([*FIELDS, 1]))),
    # hashes
    "no hashes": frame(header(json.dumps([*FIELDS, ""], separators=(",", ":")))),
    "hashes a byte short": frame(header(meta(hashes=HASHES[:-1]))),
    "hashes a byte long": frame(header(meta(extra=b"\0"))),
    "half a signature": frame(header(meta(extra=bytes(32)))),
    "two signatures": frame(header(meta(extra=bytes(128)))),
    "hashes as a number": frame(header(json.dumps([*FIELDS, 5], separators=(",", ":")))),
    "hashes beyond base85": frame(header(json.dumps([*FIELDS, "~" * 120], separators=(",", ":")))),
    "hashes with a quote": frame(header(json.dumps([*FIELDS, '"' * 120], separators=(",", ":")))),
    "hashes of other letters": frame(header(json.dumps([*FIELDS, "é" * 120], separators=(",", ":")))),
    # digest
    "payload of another message": frame(header(meta(payload=b"fedcba9876543210"))),
    "digest of zeros": frame(
        header(json.dumps([*FIELDS, base64.b85encode(HASHES + bytes(32)).decode()], separators=(",", ":")))
    ),
    "digest over another base": frame(header(meta(hashes=bytes(64)).replace("0" * 75, "x" * 75))),
    # other files
    "an empty file": b"",
    "seven bytes": bytes(7),
    "zeros": bytes(1000),
    "a zip file": b"PK\x03\x04" + bytes(200),
    "a pickle": b"\x80\x05cos\nsystem\n(S'true'\ntR." + bytes(100),
    "a sealed message": message.SEALED_PREFIX + bytes(200),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_is_refused_with_a_reason(name):
    with pytest.raises(MessageError, match=r"\w"):
        message.unpack(HOSTILE[name])
    with pytest.raises(MessageError):
        message.inspect(HOSTILE[name])


@pytest.mark.parametrize("name", HOSTILE)
def test_the_reason_is_short_and_quotes_no_flood(name):
    with pytest.raises(MessageError) as caught:
        message.unpack(HOSTILE[name])
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)
    assert "\0" not in str(caught.value)


def test_a_signature_cannot_be_moved_to_another_message():
    pair = keys.KeyPair(bytes(32))
    mine = message.Header(3, "mallory", 10, "00" * 32, bytes(range(32)).hex(), "fp32")
    signed = message.unpack_signed(message.pack(mine, PAYLOAD, sign=keys.signer(pair, "fed")))
    for fields in ([1, 4, *FIELDS[2:]], [*FIELDS[:3], "alice", *FIELDS[4:]]):
        copied = meta(fields, extra=signed.signature)
        forged = message.unpack_signed(frame(header(copied)))
        with pytest.raises(MessageError, match="signature"):
            keys.verify(pair.verify_key, "fed", forged.digest, forged.signature)


def test_a_stripped_signature_is_noticed():
    pair = keys.KeyPair(bytes(32))
    opened = message.unpack_signed(frame(header()))
    with pytest.raises(MessageError, match="not signed"):
        keys.verify(pair.verify_key, "fed", opened.digest, opened.signature)
