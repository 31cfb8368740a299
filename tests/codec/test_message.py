"""Container: one byte string per (header, payload), and every other byte string refused."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors import deserialize
from safetensors.numpy import save

from fedfstq_hf.codec import Schema, get_codec, message
from fedfstq_hf.codec.message import PAIR_PARAMS, join_pair
from fedfstq_hf.errors import MessageError

HEADER = message.Header(3, "hospital-a", 100, "ab" * 32, "cd" * 32, "fstq", {})


def test_round_trip_and_determinism():
    data = message.pack(HEADER, b"payload")
    assert message.unpack(data) == (HEADER, b"payload")
    assert message.pack(dataclasses.replace(HEADER), b"payload") == data


def test_any_safetensors_reader_opens_it():
    [(name, tensor)] = deserialize(message.pack(HEADER, b"\x01\x02\x03"))
    assert (name, tensor["dtype"], tensor["shape"], bytes(tensor["data"])) == ("payload", "U8", [3], b"\x01\x02\x03")


@pytest.mark.parametrize("size", [0, 1, 9, 10, 99, 100, 12345])
def test_overhead_is_exact_for_its_size_and_a_bound_below(size):
    overhead = message.overhead(HEADER, size)
    assert len(message.pack(HEADER, bytes(size))) == overhead + size
    assert len(message.pack(HEADER, bytes(size // 2))) <= overhead + size // 2


def test_container_is_small():
    assert message.overhead(HEADER, 4000) <= 270
    assert message.overhead(HEADER, 4000, signed=True) == message.overhead(HEADER, 4000) + 80


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (message.SEALED_PREFIX + bytes(200), "is sealed; only the holder of the private key"),
        (b"1234567", "has 7 bytes; expected at least the 8 bytes"),
        ((13).to_bytes(8, "little") + b'{"payload":1', "announces a header of 13 bytes; more than it holds"),
        ((5000).to_bytes(8, "little") + b" " * 6000, "announces a header of 5000 bytes; more than it holds or the"),
    ],
)
def test_what_cannot_be_a_message_is_refused_before_it_is_parsed(monkeypatch, data, match):
    monkeypatch.delattr(message, "json")
    with pytest.raises(MessageError, match=match):
        message.unpack(data)


def test_brackets_without_end_are_refused_as_everything_else():
    """Python's parser gives up on a thousand of them with a RecursionError."""
    with pytest.raises(MessageError, match=r"cannot be read \(RecursionError\)"):
        message.unpack((1200).to_bytes(8, "little") + b"[" * 1200)


def sign(digest):
    return digest + digest[::-1]


def test_a_signature_is_carried_and_covers_the_digest():
    data = message.pack(HEADER, b"payload", sign=sign)
    opened = message.unpack_signed(data)
    assert opened[:2] == message.unpack(data) == (HEADER, b"payload")
    assert opened.signature == sign(opened.digest)
    assert len(data) == message.overhead(HEADER, 7, signed=True) + 7
    plain = message.unpack_signed(message.pack(HEADER, b"payload"))
    assert (plain.digest, plain.signature) == (opened.digest, None)


def test_every_flipped_bit_of_a_signed_message_is_refused_or_changes_the_signature_alone():
    data = message.pack(HEADER, b"payload", sign=sign)
    good, same_digest = message.unpack_signed(data), 0
    for position in range(8 * len(data)):
        bad = bytearray(data)
        bad[position // 8] ^= 1 << position % 8
        try:
            opened = message.unpack_signed(bytes(bad))
        except MessageError:
            continue
        same_digest += 1
        assert opened[:3] == good[:3]
        assert opened.signature != good.signature
    assert same_digest > 100


def test_a_signature_of_another_length_is_refused():
    with pytest.raises(MessageError, match="63 bytes"):
        message.pack(HEADER, b"", sign=lambda digest: bytes(63))


def test_the_longest_client_id_fits_with_a_signature():
    longest = dataclasses.replace(HEADER, client_id="a" * 64, codec="c" * 32, round=2**53 - 1, num_examples=2**53 - 1)
    data = message.pack(longest, b"", sign=sign)
    assert message.unpack(data)[0] == longest


def test_another_version_says_what_to_install():
    text = _text(message.pack(HEADER, b"abcd")).replace("[1,3,100,", "[2,3,100,")
    with pytest.raises(MessageError, match=r"version 2.*pip install --upgrade fedfstq_hf"):
        message.unpack(_frame(text, b"abcd"))
    # also where later versions have other fields
    with pytest.raises(MessageError, match=r"version 2.*pip install --upgrade fedfstq_hf"):
        message.unpack(_frame(text.replace("[2,3,100,", "[2,"), b"abcd"))


def test_params_round_trip_in_any_order():
    params = {"z": 1, "a": 0.25, "b": None, "c": True, "d": 'quote " and \\ and é'}
    one = message.pack(dataclasses.replace(HEADER, params=params), b"x")
    two = message.pack(dataclasses.replace(HEADER, params=dict(reversed(params.items()))), b"x")
    assert one == two
    assert message.unpack(one)[0].params == params


@pytest.mark.parametrize(
    "change",
    [
        {"round": -1},
        {"round": True},
        {"round": 1.0},
        {"num_examples": 2**60},
        {"client_id": ""},
        {"client_id": "-x"},
        {"client_id": "a" * 65},
        {"client_id": "../up"},
        {"client_id": "a\n"},
        {"base": "AB" * 32},
        {"schema": "ab"},
        {"codec": "no spaces"},
        {"params": {"a": float("nan")}},
        {"params": {"a": [1]}},
        {"params": {1: 2}},
        {"params": None},
    ],
)
def test_bad_header_fields_are_refused(change):
    with pytest.raises(MessageError):
        dataclasses.replace(HEADER, **change)


def test_too_much_metadata_is_refused():
    with pytest.raises(MessageError, match="512"):
        message.pack(dataclasses.replace(HEADER, params={"a": "x" * 400}), b"")


def test_max_bytes_is_checked_before_anything_else():
    data = message.pack(HEADER, bytes(100))
    assert message.unpack(data, max_bytes=len(data))[1] == bytes(100)
    with pytest.raises(MessageError, match=f"at most {len(data) - 1}"):
        message.unpack(data, max_bytes=len(data) - 1)


def test_every_flipped_bit_and_every_truncation_is_refused():
    data = message.pack(HEADER, b"some payload")
    for position in range(len(data)):
        for bit in range(8):
            bad = bytearray(data)
            bad[position] ^= 1 << bit
            with pytest.raises(MessageError):
                message.unpack(bytes(bad))
        with pytest.raises(MessageError):
            message.unpack(data[:position])
    with pytest.raises(MessageError):
        message.unpack(data + b"\0")


def _frame(text: str, payload: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text.encode() + payload


def _text(data: bytes) -> str:
    return data[8 : 8 + int.from_bytes(data[:8], "little")].decode()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('{"__metadata__"', '{ "__metadata__"'),
        ('"__metadata__":{"fstq"', '"__metadata__":{"other":"x","fstq"'),
        ('"payload":', '"payloaf":'),
        ('"U8"', '"I8"'),
        ('"shape":[4]', '"shape":[2,2]'),
        ('"shape":[4]', '"shape":[5]'),
        ('"data_offsets":[0,4]', '"data_offsets":[0,3]'),
        ('"data_offsets":[0,4]', '"data_offsets":[1,4]'),
        ("[1,3,100,", "[2,3,100,"),
        ("[1,3,100,", "[1,3.0,100,"),
        ("[1,3,100,", "[1,3,1e2,"),
        ("[1,3,100,", "[1, 3,100,"),
        ("[1,3,100,", "[true,3,100,"),
        ("[1,3,100,", "[1,100,"),
        ("[1,3,100,", "[1,NaN,100,"),
        ("{},", '{\\"a\\":1,\\"a\\":2},'),
        ("{},", "[],"),
        ("{},", "{" * 60),
    ],
)
def test_deviating_headers_are_refused(old, new):
    data = message.pack(HEADER, b"abcd")
    text = _text(data)
    assert old in text
    with pytest.raises(MessageError):
        message.unpack(_frame(text.replace(old, new, 1), b"abcd"))


def test_a_foreign_safetensors_file_is_refused():
    for data in (save({"payload": np.zeros(4, np.uint8)}), save({"x": np.zeros(4)}, {"fstq": "[]"}), b"", b"\xff" * 40):
        with pytest.raises(MessageError):
            message.unpack(data)


def test_an_oversized_header_length_is_refused_without_reading_on():
    with pytest.raises(MessageError, match="announces"):
        message.unpack((2**63).to_bytes(8, "little") + b"{}")


def test_swapped_payloads_are_refused():
    one, two = message.pack(HEADER, b"abcd"), message.pack(HEADER, b"efgh")
    with pytest.raises(MessageError, match="digest"):
        message.unpack(one[:-4] + two[-4:])


def test_the_digest_covers_the_header():
    data = message.pack(HEADER, b"abcd")
    forged = _frame(_text(data).replace("[1,3,100,", "[1,4,100,"), b"abcd")
    with pytest.raises(MessageError, match="digest"):
        message.unpack(forged)


def test_inspect_counts_per_matrix():
    delta = {"a": torch.tensor([[1.0, 0.0], [0.0, 0.0]]), "b": torch.tensor([2.0, -2.0])}
    schema = Schema.from_state_dict(delta)
    header = dataclasses.replace(HEADER, codec="fp32", schema=schema.fingerprint)
    data = message.pack(header, get_codec("fp32").encode(delta).payload)
    info = message.inspect(data, schema)
    assert [(m.name, m.size, m.sent, m.rms) for m in info.matrices] == [("a", 4, 1, 1.0), ("b", 2, 2, 2.0)]
    assert info.total_bytes == len(data)
    assert "3 of 6 coordinates" in str(info)
    assert message.inspect(data).matrices == ()
    assert "hospital-a" in str(message.inspect(data))


def test_inspect_counts_the_update_of_a_pair_alone():
    schema = Schema.from_state_dict({"a": torch.zeros(4)})
    update, variate = (
        get_codec("fp32").encode({"a": torch.tensor(values)}).payload
        for values in ([3.0, 0.0, 0.0, 0.0], [5.0, 5.0, 5.0, 0.0])
    )
    header = dataclasses.replace(HEADER, codec="fp32", schema=schema.fingerprint, params=dict(PAIR_PARAMS))
    info = message.inspect(message.pack(header, join_pair(update, variate)), schema)
    assert [(m.sent, m.rms) for m in info.matrices] == [(1, 3.0)]


@pytest.mark.parametrize(
    "change", [{"codec": "nonesuch"}, {"params": {"x": 1}}, {"codec": "paper", "params": {"shares": 5}}]
)
def test_inspect_refuses_codecs_that_cannot_be_made(change):
    schema = Schema.from_state_dict({"a": torch.zeros(1)})
    header = dataclasses.replace(HEADER, schema=schema.fingerprint, **change)
    with pytest.raises(MessageError, match="codec"):
        message.inspect(message.pack(header, b""), schema)


def test_inspect_says_whether_a_message_is_signed():
    assert "not signed" in str(message.inspect(message.pack(HEADER, b"")))
    assert "not signed" not in str(message.inspect(message.pack(HEADER, b"", sign=sign)))


def test_inspect_refuses_another_schema():
    with pytest.raises(MessageError, match="schema"):
        message.inspect(message.pack(HEADER, b""), Schema.from_state_dict({"a": torch.zeros(1)}))


def test_metadata_is_one_key_of_canonical_json():
    header = json.loads(_text(message.pack(HEADER, b"abcd")))
    assert list(header) == ["__metadata__", "payload"]
    assert list(header["__metadata__"]) == ["fstq"]
    fields = json.loads(header["__metadata__"]["fstq"])
    assert fields[:6] == [1, 3, 100, "hospital-a", "fstq", {}]
    assert json.dumps(fields, separators=(",", ":")) == header["__metadata__"]["fstq"]


LONGEST = message.MAX_CONTAINER - 8


@pytest.mark.parametrize("more", [1, 10_000, 10_000_000])
def test_a_longer_header_than_any_is_refused_before_it_is_parsed(more, monkeypatch):
    """The file holds it all: only the cap stands between such a header and the JSON parser."""
    text = _text(message.pack(HEADER, b"abcd"))
    monkeypatch.setattr(message.json, "loads", lambda data: pytest.fail(f"{len(data)} bytes were parsed"))
    with pytest.raises(MessageError, match=f"announces a header of {LONGEST + more} bytes"):
        message.unpack(_frame(text + " " * (LONGEST + more - len(text)), b"abcd"))


def test_a_header_of_the_longest_length_is_read_and_refused_for_its_form():
    text = _text(message.pack(HEADER, b"abcd"))
    with pytest.raises(MessageError, match="not in canonical form"):
        message.unpack(_frame(text + " " * (LONGEST - len(text)), b"abcd"))


def test_the_longest_header_of_all_fits():
    """Quotes double when the metadata are written as a string."""
    room = 512 - len(_meta({"p": ""}))
    longest = dataclasses.replace(HEADER, params={"p": '"' * (room // 2)})
    data = message.pack(longest, bytes(2**20))
    assert message.unpack(data)[0] == longest
    assert len(data) - 2**20 <= message.MAX_CONTAINER
    assert len(json.loads(_text(data))["__metadata__"]["fstq"]) in (511, 512)


def _meta(params):
    data = message.pack(dataclasses.replace(HEADER, params=params), b"")
    return json.loads(_text(data))["__metadata__"]["fstq"]


@pytest.mark.parametrize("depth", [500, 1100])
def test_deep_json_is_refused_as_unreadable(depth):
    for text in ("[" * depth, '{"__metadata__":{"fstq":' + "[" * depth, '{"a":' * (depth // 5)):
        with pytest.raises(MessageError, match="metadata cannot be read"):
            message.unpack(_frame(text, b""))


@pytest.mark.parametrize("value", [10**300, 2**53, -1, 1.0, True, None, "1"])
@pytest.mark.parametrize("name", ["round", "num_examples"])
def test_counts_are_whole_and_bounded(name, value):
    with pytest.raises(MessageError, match=rf"message {name} is .*; expected an integer from 0 to 2\*\*53 - 1"):
        dataclasses.replace(HEADER, **{name: value})
    assert getattr(dataclasses.replace(HEADER, **{name: 2**53 - 1}), name) == 2**53 - 1


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan"), 2**53, -(10**300), [], {}, (1,), b"x"])
def test_parameters_are_scalars(value):
    with pytest.raises(MessageError, match=r"expected text, number, bool or null|expected a number within"):
        dataclasses.replace(HEADER, params={"a": value})
