"""Key files: written, read, and checked against what a federation expects, before anybody trains for nothing."""

from __future__ import annotations

import os
import re
from functools import partial
from pathlib import Path

from fedfstq_hf.errors import ConfigError
from fedfstq_hf.federation.control import read_control
from fedfstq_hf.federation.keys import KeyPair, Sign, Unseal, seal, signer, unseal
from fedfstq_hf.federation.mailbox.protocol import Mailbox
from fedfstq_hf.federation.spec import FederationSpec

KeyFile = str | os.PathLike[str]
_FILE = re.compile(r"fedfstq private key, keep it secret\n([0-9a-f]{64})\n")


def save_keypair(path: Path, pair: KeyPair) -> None:
    """Write a key file that only its owner can read. Raises ConfigError if `path` exists or cannot be written."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise ConfigError(f"{path} exists already; it was left alone. Give the new key another file name.") from None
    except OSError as error:
        raise ConfigError(f"The key file {path} cannot be written: {error.strerror or error}.") from error
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(f"fedfstq private key, keep it secret\n{pair.seed.hex()}\n")
        file.flush()
        os.fsync(file.fileno())


def load_signing_key(path: Path | str) -> KeyPair:
    """Read a key file. Raises ConfigError if it is missing, no key file, or readable by anyone but its owner."""
    try:
        with open(path, encoding="ascii") as file:
            mode = os.fstat(file.fileno()).st_mode
            text = file.read(200)
    except FileNotFoundError:
        raise ConfigError(f"There is no key file {path}. Make one: fedfstq keys new {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ConfigError(f"The key file {path} cannot be read: {reason}. Make one: fedfstq keys new KEYFILE") from None
    if mode & 0o077:
        raise ConfigError(
            f"The key file {path} has mode {mode & 0o777:04o}: others on this machine can get at it. "
            f"Type: chmod 600 {path}"
        )
    match = _FILE.fullmatch(text)
    if not match:
        raise ConfigError(f"{path} is no key file of this package. Make one: fedfstq keys new KEYFILE")
    return KeyPair(bytes.fromhex(match[1]))


def client_signer(mailbox: Mailbox, spec: FederationSpec, client_id: str, key_file: KeyFile | None) -> Sign | None:
    """What signs a client's messages with its key file; None where it has none and needs none.

    Raises:
        ConfigError: the key is missing or is another one than the client is enrolled with, or PyNaCl is missing.
    """
    if spec.sealing_key is not None:
        seal(spec.sealing_key, b"")  # says what to install, if anything
    enrolled = read_control(mailbox).enrolment(client_id).verify_key
    if key_file is None:
        if enrolled is not None or spec.signatures:
            raise ConfigError(
                f"{mailbox.address} takes signed messages only from client {client_id!r}. Give its key file as "
                "signing_key; `fedfstq keys new KEYFILE` makes one."
            )
        return None
    pair = load_signing_key(os.fspath(key_file))
    if enrolled != pair.verify_key and (enrolled is not None or spec.signatures):
        raise ConfigError(
            f"Client {client_id!r} is enrolled with {enrolled or 'no verify key'}, but {key_file} signs as "
            f"{pair.verify_key}. Give the right key file, or ask for `fedfstq enrol {mailbox.address} {client_id} "
            f"--verify-key {pair.verify_key}`."
        )
    return signer(pair, spec.id)


def coordinator_unseal(address: str, spec: FederationSpec, key_file: KeyFile | None) -> Unseal | None:
    """What opens the messages of a federation; None where they are not sealed.

    Raises:
        ConfigError: they are sealed, and the key is missing or another one.
    """
    if spec.sealing_key is None:
        if key_file is not None and spec.founder_key is None:
            raise ConfigError(f"Messages in {address} are not sealed, nor its records signed: leave --key out.")
        return None
    if key_file is None:
        raise ConfigError(
            f"Messages in {address} are sealed to {spec.sealing_key}. Type --key KEYFILE with the key file that this "
            "public key belongs to."
        )
    pair = load_signing_key(os.fspath(key_file))
    if pair.seal_key != spec.sealing_key:
        raise ConfigError(
            f"Messages in {address} are sealed to {spec.sealing_key}; {key_file} opens what is sealed to "
            f"{pair.seal_key}. Give the key file that the federation was founded with."
        )
    return partial(unseal, pair)


def coordinator_signer(address: str, spec: FederationSpec, key_file: KeyFile | None) -> Sign | None:
    """What signs the records of a federation; None where they are not signed.

    Raises:
        ConfigError: they are signed, and the key is missing or another one.
    """
    if spec.founder_key is None:
        return None
    if key_file is None:
        raise ConfigError(
            f"Records of {address} are signed with {spec.founder_key}. Type --key KEYFILE with the key file that this "
            "public key belongs to."
        )
    pair = load_signing_key(os.fspath(key_file))
    if pair.verify_key != spec.founder_key:
        raise ConfigError(
            f"Records of {address} are signed with {spec.founder_key}; {key_file} signs as {pair.verify_key}. Give the "
            "key file that the federation was founded with."
        )
    return signer(pair, spec.id)
