"""Signatures and sealed messages: one key file per party, Ed25519 to sign with and X25519 to open sealed messages.

Both private keys are derived from the file's one 32-byte seed by BLAKE2b under different labels, so that neither tells
anything of the other. PyNaCl (libsodium) does the cryptography; it is imported when first needed.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from types import ModuleType

from fedfstq_hf.codec.message import SEALED_PREFIX, SIGNATURE_BYTES, is_sealed
from fedfstq_hf.errors import ConfigError, MessageError

SEAL_OVERHEAD = len(SEALED_PREFIX) + 48  # an ephemeral public key and an authentication tag
_KEY_BYTES = 32
_DIGEST_BYTES = 32
_PUBLIC = re.compile(r"(ed25519|x25519):([0-9a-f]{64})")


Sign = Callable[[bytes], bytes]
"""Signs a digest: 32 bytes -> 64 bytes."""
Unseal = Callable[[bytes], bytes]
"""Opens what was sealed to a party's own key."""


@dataclass(frozen=True)
class KeyPair:
    """A party's keys. `verify_key` and `seal_key` are public texts; the seed shows up in no repr and no error."""

    seed: bytes = field(repr=False)

    @cached_property
    def verify_key(self) -> str:
        """`ed25519:` and 64 hex digits: checks this party's signatures."""
        signing = _nacl("signing").SigningKey(_derive(self.seed, b"fedfstq sign"))
        return f"ed25519:{bytes(signing.verify_key).hex()}"

    @cached_property
    def seal_key(self) -> str:
        """`x25519:` and 64 hex digits: seals messages that only this party can open."""
        private = _nacl("public").PrivateKey(_derive(self.seed, b"fedfstq seal"))
        return f"x25519:{bytes(private.public_key).hex()}"


def new_keypair() -> KeyPair:
    """Fresh keys from the system's randomness."""
    return KeyPair(secrets.token_bytes(_KEY_BYTES))


def signer(keys: KeyPair, federation_id: str) -> Sign:
    """The `sign` of `message.pack`: 64-byte Ed25519 signature of a digest, good in one federation only."""
    signing = _nacl("signing").SigningKey(_derive(keys.seed, b"fedfstq sign"))

    def sign(digest: bytes) -> bytes:
        return bytes(signing.sign(_signed_text(federation_id, digest)).signature)

    return sign


def verify(verify_key: str, federation_id: str, digest: bytes, signature: bytes | None) -> None:
    """Raise MessageError unless `signature` is `verify_key`'s for this federation and message digest (32 bytes)."""
    key = _nacl("signing").VerifyKey(parse_public_key(verify_key, "ed25519"))
    if signature is None:
        raise MessageError(
            f"message is not signed; expected a signature by {verify_key}. The client signs with its key file; "
            "fedfstq keys new KEYFILE makes one"
        )
    text = _signed_text(federation_id, digest)
    try:
        # another length would be a ValueError there
        good = len(signature) == SIGNATURE_BYTES and key.verify(text, signature) == text
    except _nacl("exceptions").BadSignatureError:
        good = False
    if not good:
        raise MessageError(
            f"message signature is not by {verify_key} for federation {federation_id[:12]}; it was signed with another "
            "key or for another federation, or was altered"
        )


def seal(seal_key: str, data: bytes) -> bytes:
    """`data` for the holder of `seal_key` alone, SEAL_OVERHEAD bytes longer. It does not say who sealed it: sign first.

    Sealing the same data twice gives different bytes. Raises ConfigError if the key is malformed.
    """
    public = _nacl("public")
    key = parse_public_key(seal_key, "x25519")
    try:
        return SEALED_PREFIX + bytes(public.SealedBox(public.PublicKey(key)).encrypt(data))
    except _nacl("exceptions").CryptoError:  # a point of small order
        raise ConfigError(f"{seal_key} is no key that fedfstq made; ask the coordinator for its public key") from None


def unseal(keys: KeyPair, data: bytes) -> bytes:
    """What was sealed to `keys.seal_key`. Raises MessageError if `data` is not sealed, or not to this key."""
    if not is_sealed(data):
        raise MessageError(f"message begins with {data[:8].hex()}; it is not sealed")
    public = _nacl("public")
    box = public.SealedBox(public.PrivateKey(_derive(keys.seed, b"fedfstq seal")))
    try:
        return bytes(box.decrypt(data[len(SEALED_PREFIX) :]))
    except (_nacl("exceptions").CryptoError, ValueError, TypeError):
        raise MessageError(
            f"message of {len(data)} bytes cannot be unsealed: it was altered, or sealed to another key than "
            f"{keys.seal_key}"
        ) from None


def parse_public_key(text: str, kind: str) -> bytes:
    """The 32 bytes of `ed25519:...` (signatures) or `x25519:...` (sealing), as `fedfstq keys show` prints them."""
    match = _PUBLIC.fullmatch(text) if isinstance(text, str) else None
    if not match or match[1] != kind:
        # a private key pasted by mistake must not end up in a log
        given = match[1] + " key" if match else "something else"
        raise ConfigError(
            f"Expected a public key of the form {kind}:<64 hex digits>, got {given}. See it: fedfstq keys show KEYFILE"
        )
    return bytes.fromhex(match[2])


def _signed_text(federation_id: str, digest: bytes) -> bytes:
    if len(digest) != _DIGEST_BYTES:
        raise MessageError(f"message digest has {len(digest)} bytes; expected {_DIGEST_BYTES}")
    return b"fedfstq signature\n" + federation_id.encode() + digest


def _derive(seed: bytes, label: bytes) -> bytes:
    return hashlib.blake2b(key=seed, person=label, digest_size=_KEY_BYTES).digest()


def _nacl(module: str) -> ModuleType:
    from importlib import import_module

    try:
        return import_module(f"nacl.{module}")
    except ImportError:
        raise ConfigError(
            'Signing and sealing need PyNaCl, which is not installed. Type: pip install "fedfstq_hf[secure]"'
        ) from None
