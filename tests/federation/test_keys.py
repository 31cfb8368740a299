"""Keys: what a signature binds, who can open a sealed message, and that no private key gets out."""

import os
import stat

import pytest
from nacl.signing import SigningKey
from typer.testing import CliRunner

from fedfstq_hf.cli import app
from fedfstq_hf.codec import message
from fedfstq_hf.errors import ConfigError, MessageError
from fedfstq_hf.federation import key_files, keys

DIGEST = bytes(range(32))
ALICE, BOB = keys.KeyPair(b"\1" * 32), keys.KeyPair(b"\2" * 32)


def test_a_signature_is_ed25519_over_prefix_federation_and_digest():
    signature = keys.signer(ALICE, "fed-1")(DIGEST)
    public = SigningKey(keys._derive(ALICE.seed, b"fedfstq sign")).verify_key
    assert public.verify(b"fedfstq signature\nfed-1" + DIGEST, signature)
    assert ALICE.verify_key == f"ed25519:{bytes(public).hex()}"
    assert keys.verify(ALICE.verify_key, "fed-1", DIGEST, signature) is None


@pytest.mark.parametrize(
    ("key", "federation", "digest", "change"),
    [
        (BOB.verify_key, "fed-1", DIGEST, lambda s: s),
        (ALICE.verify_key, "fed-2", DIGEST, lambda s: s),
        (ALICE.verify_key, "fed-1", DIGEST[::-1], lambda s: s),
        (ALICE.verify_key, "fed-1", DIGEST, lambda s: s[:-1] + bytes([s[-1] ^ 1])),
        (ALICE.verify_key, "fed-1", DIGEST, lambda s: s[:-1]),
        (ALICE.verify_key, "fed-1", DIGEST, lambda s: s + b"\0"),
        (ALICE.verify_key, "fed-1", DIGEST, lambda s: b""),
        (ALICE.verify_key, "fed-1", DIGEST, lambda s: bytes(64)),
        (ALICE.verify_key, "fed-1", DIGEST, lambda s: None),
    ],
)
def test_any_other_signature_is_refused(key, federation, digest, change):
    signature = change(keys.signer(ALICE, "fed-1")(DIGEST))
    with pytest.raises(MessageError, match=r"expected a signature by|is not by"):
        keys.verify(key, federation, digest, signature)


def test_the_federation_id_cannot_be_moved_into_the_digest():
    with pytest.raises(MessageError, match="31 bytes"):
        keys.signer(ALICE, "fed-1x")(DIGEST[1:])


def test_a_public_key_of_small_order_signs_nothing():
    # the neutral element as public key would make one signature good for every digest
    neutral = "ed25519:" + (b"\1" + bytes(31)).hex()
    with pytest.raises(MessageError):
        keys.verify(neutral, "fed-1", DIGEST, b"\1" + bytes(63))


def test_a_signed_message_binds_header_and_payload():
    header = message.Header(3, "hospital-a", 100, "ab" * 32, "cd" * 32, "fstq", {})
    data = message.pack(header, b"payload", sign=keys.signer(ALICE, "fed-1"))
    opened = message.unpack_signed(data)
    keys.verify(ALICE.verify_key, "fed-1", opened.digest, opened.signature)
    assert data == message.pack(header, b"payload", sign=keys.signer(ALICE, "fed-1"))
    for other in (
        message.pack(header, b"other"),
        message.pack(message.Header(4, *list(vars(header).values())[1:]), b"payload"),
    ):
        with pytest.raises(MessageError, match="is not by"):
            keys.verify(ALICE.verify_key, "fed-1", message.unpack_signed(other).digest, opened.signature)


@pytest.mark.parametrize("data", [b"", b"x", bytes(10_000)])
def test_only_the_holder_unseals(data):
    sealed = keys.seal(ALICE.seal_key, data)
    assert len(sealed) == len(data) + keys.SEAL_OVERHEAD
    assert message.is_sealed(sealed)
    assert keys.unseal(ALICE, sealed) == data
    assert keys.seal(ALICE.seal_key, data) != sealed
    with pytest.raises(MessageError, match="another key"):
        keys.unseal(BOB, sealed)


def test_altered_and_plain_messages_do_not_unseal():
    sealed = keys.seal(ALICE.seal_key, b"secret")
    for position in range(len(keys.SEALED_PREFIX), len(sealed)):
        with pytest.raises(MessageError, match="altered"):
            keys.unseal(ALICE, sealed[:position] + bytes([sealed[position] ^ 1]) + sealed[position + 1 :])
        with pytest.raises(MessageError, match="altered"):
            keys.unseal(ALICE, sealed[:position])
    with pytest.raises(MessageError, match="not sealed"):
        keys.unseal(ALICE, b"plain")


def test_a_plain_message_is_told_from_a_sealed_one():
    data = message.pack(message.Header(3, "a", 1, "ab" * 32, "cd" * 32, "fstq", {}), b"payload")
    assert not message.is_sealed(data)
    with pytest.raises(MessageError, match="sealed"):
        message.unpack(keys.seal(ALICE.seal_key, data))


def test_signing_and_sealing_keys_differ_and_are_not_interchangeable():
    assert ALICE.verify_key.split(":")[1] != ALICE.seal_key.split(":")[1]
    with pytest.raises(ConfigError, match=r"x25519.*got ed25519 key"):
        keys.seal(ALICE.verify_key, b"")
    with pytest.raises(ConfigError, match=r"ed25519.*got x25519 key"):
        keys.verify(ALICE.seal_key, "fed-1", DIGEST, bytes(64))


@pytest.mark.parametrize("bad", ["", "ed25519:", "ed25519:" + "g" * 64, ALICE.seed.hex(), None])
def test_malformed_public_keys_are_refused_without_repeating_them(bad):
    with pytest.raises(ConfigError, match="fedfstq keys show") as caught:
        keys.parse_public_key(bad, "ed25519")
    assert ALICE.seed.hex() not in str(caught.value)


def test_sealing_to_a_point_of_small_order_is_refused():
    with pytest.raises(ConfigError, match="no key"):
        keys.seal("x25519:" + "00" * 32, b"secret")


def test_a_key_file_round_trips_and_belongs_to_its_owner(tmp_path):
    path = tmp_path / "client.key"
    old = os.umask(0)
    try:
        key_files.save_keypair(path, ALICE)
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert key_files.load_signing_key(path) == ALICE
    with pytest.raises(ConfigError, match="exists already"):
        key_files.save_keypair(path, BOB)
    assert key_files.load_signing_key(path) == ALICE


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620])
def test_a_key_file_that_others_can_get_at_is_refused_with_the_remedy(tmp_path, mode):
    path = tmp_path / "client.key"
    key_files.save_keypair(path, ALICE)
    path.chmod(mode)
    with pytest.raises(ConfigError, match=f"chmod 600 {path}") as caught:
        key_files.load_signing_key(path)
    assert ALICE.seed.hex() not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", ALICE.seed.hex().encode(), b"x" * 500])
def test_what_is_no_key_file_is_refused_without_repeating_it(tmp_path, content):
    path = tmp_path / "client.key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="fedfstq keys new") as caught:
        key_files.load_signing_key(path)
    assert ALICE.seed.hex() not in str(caught.value)


def test_a_missing_key_file_names_the_command(tmp_path):
    with pytest.raises(ConfigError, match="fedfstq keys new"):
        key_files.load_signing_key(tmp_path / "none.key")


def test_no_private_key_in_a_repr():
    assert ALICE.seed.hex() not in repr(ALICE)
    assert repr(ALICE.seed) not in repr(ALICE)


def test_new_keys_differ():
    assert keys.new_keypair() != keys.new_keypair()


def test_without_pynacl_the_remedy_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "nacl.signing", None)
    with pytest.raises(ConfigError, match=r'pip install "fedfstq_hf\[secure\]"'):
        keys.signer(ALICE, "fed-1")


def test_commands_make_and_show_keys(tmp_path):
    path, runner = tmp_path / "client.key", CliRunner()
    made = runner.invoke(app, ["keys", "new", str(path)])
    pair = key_files.load_signing_key(path)
    shown = runner.invoke(app, ["keys", "show", str(path)])
    for result in (made, shown):
        assert result.exit_code == 0
        assert pair.verify_key in result.output
        assert pair.seal_key in result.output
        assert pair.seed.hex() not in result.output
    again = runner.invoke(app, ["keys", "new", str(path)])
    assert isinstance(again.exception, ConfigError)
    assert key_files.load_signing_key(path) == pair
