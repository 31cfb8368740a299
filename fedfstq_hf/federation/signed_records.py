"""Round records signed by who founded the federation, so that clients train from no adapter of somebody else.

The spec names the founder's key and clients keep the spec, so a mailbox cannot change it under them. A record names the
adapter by its digest, says who is asked, and what became of each message: whoever forges one decides all of that.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable

from fedfstq_hf.errors import ConfigError, MailboxError, MessageError
from fedfstq_hf.federation import keys
from fedfstq_hf.federation.record import RoundRecord
from fedfstq_hf.federation.spec import FederationSpec

Sign = Callable[[bytes], bytes]


def sign_record(record: RoundRecord, spec: FederationSpec, sign: Sign | None) -> RoundRecord:
    """The record with its signature; as it is where the spec names no founder's key.

    Raises:
        ConfigError: it names one, and there is no `sign`.
    """
    if spec.founder_key is None:
        return record
    if sign is None:
        raise ConfigError(
            f"Records of this federation are signed with {spec.founder_key}. Type --key KEYFILE with the key file that "
            "this public key belongs to."
        )
    return dataclasses.replace(record, signature=sign(_digest(record)).hex())


def check_record(record: RoundRecord, spec: FederationSpec) -> None:
    """Raise MailboxError unless the founder signed it, or the spec names no founder's key."""
    if spec.founder_key is None:
        return
    try:
        keys.verify(spec.founder_key, spec.id, _digest(record), bytes.fromhex(record.signature))
    except (MessageError, ValueError, TypeError):
        raise MailboxError(
            f"The record of round {record.round} is not signed with {spec.founder_key}, the key of this federation's "
            "founder: somebody else wrote it. Nothing of it was used; ask the founder."
        ) from None


def _digest(record: RoundRecord) -> bytes:
    return hashlib.sha256(b"fedfstq record\n" + dataclasses.replace(record, signature="").to_json()).digest()
