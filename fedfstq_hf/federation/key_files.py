"""Key files, checked against what the federation expects: better before training than in a refusal after it."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial

from fedfstq_hf.errors import ConfigError
from fedfstq_hf.federation import keys
from fedfstq_hf.federation.control import read_control
from fedfstq_hf.federation.mailbox.protocol import Mailbox
from fedfstq_hf.federation.server.screening import Unseal
from fedfstq_hf.federation.spec import FederationSpec

KeyFile = str | os.PathLike[str]


def client_signer(
    mailbox: Mailbox, spec: FederationSpec, client_id: str, key_file: KeyFile | None
) -> Callable[[bytes], bytes] | None:
    """What signs a client's messages with its key file; None where it has none and needs none.

    Raises:
        ConfigError: the key is missing or is another one than the client is enrolled with, or PyNaCl is missing.
    """
    if spec.sealing_key is not None:
        keys.seal(spec.sealing_key, b"")  # says what to install, if anything
    enrolled = read_control(mailbox).enrolment(client_id).verify_key
    if key_file is None:
        if enrolled is not None or spec.signatures:
            raise ConfigError(
                f"{mailbox.address} takes signed messages only from client {client_id!r}. Give its key file as "
                "signing_key; `fedfstq keys new KEYFILE` makes one."
            )
        return None
    pair = keys.load_signing_key(os.fspath(key_file))
    if enrolled != pair.verify_key and (enrolled is not None or spec.signatures):
        raise ConfigError(
            f"Client {client_id!r} is enrolled with {enrolled or 'no verify key'}, but {key_file} signs as "
            f"{pair.verify_key}. Give the right key file, or ask for `fedfstq enrol {mailbox.address} {client_id} "
            f"--verify-key {pair.verify_key}`."
        )
    return keys.signer(pair, spec.id)


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
    pair = keys.load_signing_key(os.fspath(key_file))
    if pair.seal_key != spec.sealing_key:
        raise ConfigError(
            f"Messages in {address} are sealed to {spec.sealing_key}; {key_file} opens what is sealed to "
            f"{pair.seal_key}. Give the key file that the federation was founded with."
        )
    return partial(keys.unseal, pair)


def coordinator_signer(address: str, spec: FederationSpec, key_file: KeyFile | None) -> Callable[[bytes], bytes] | None:
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
    pair = keys.load_signing_key(os.fspath(key_file))
    if pair.verify_key != spec.founder_key:
        raise ConfigError(
            f"Records of {address} are signed with {spec.founder_key}; {key_file} signs as {pair.verify_key}. Give the "
            "key file that the federation was founded with."
        )
    return keys.signer(pair, spec.id)
