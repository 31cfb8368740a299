"""Founding a federation: round 0."""

from __future__ import annotations

import time

from fedfstq_hf.adapters.allow_list import check_own
from fedfstq_hf.errors import ConfigError, RoundConflictError
from fedfstq_hf.federation import history
from fedfstq_hf.federation.aggregation import check_server
from fedfstq_hf.federation.control import Control
from fedfstq_hf.federation.keys import Sign
from fedfstq_hf.federation.mailbox.protocol import ADAPTER_CONFIG_FILE, ADAPTER_FILE, RECORD_FILE, SPEC_FILE, Mailbox
from fedfstq_hf.federation.record import RoundRecord
from fedfstq_hf.federation.server.publication import CardMaker, make_record, root_files
from fedfstq_hf.federation.spec import FederationSpec


def found_federation(
    mailbox: Mailbox,
    spec: FederationSpec,
    adapter: bytes,
    adapter_config: bytes,
    *,
    control: Control | None = None,
    now: float | None = None,
    card: CardMaker | None = None,
    sign: Sign | None = None,
) -> RoundRecord:
    """Publish round 0: the spec and the initial adapter.

    Args:
        adapter: an `adapter_model.safetensors` file; its schema must be the spec's.
        adapter_config: the PEFT `adapter_config.json`; `{}` for an adapter that PEFT does not know.
        control: who is enrolled; None lets anybody join who can write to the mailbox.
        now: seconds since the epoch; the wall clock when None.
        card: makes the root's readable files.
        sign: signs the record with the spec's founder key (`keys.signer`), where it names one.

    Raises:
        AdapterMismatchError: no client would join with this configuration.
        ConfigError: the spec asks for more clients than are enrolled, or for a signature that cannot be made.
        RoundConflictError: the mailbox already holds a federation.
    """
    check_server(spec.method.server.to_yaml())
    if adapter_config.strip() != b"{}":
        check_own(adapter_config)
    if mailbox.head() is not None:
        raise RoundConflictError(
            f"{mailbox.address} already holds a federation. Give a new address, or go on with "
            f"`fedfstq serve {mailbox.address}`."
        )
    control = control or Control()
    if spec.clients_per_round is not None and control.clients is None:
        raise ConfigError(
            f"clients_per_round = {spec.clients_per_round} asks for clients to draw from, and none are enrolled by "
            "name. Type --clients NAME,NAME,..."
        )
    if control.clients is not None and len(control.clients) < spec.min_clients:
        raise ConfigError(
            f"{len(control.clients)} clients are enrolled, but {spec.min_clients} updates close a round: it could "
            "never close. Enrol more, or type --min-clients."
        )
    record = make_record(
        spec,
        adapter,
        0,
        time.time() if now is None else now,
        seconds=spec.round_seconds,
        selected=control.select(0, spec.seed, spec.clients_per_round),
        sign=sign,
    )
    files = {
        SPEC_FILE: spec.to_json(),
        RECORD_FILE: record.to_json(),
        ADAPTER_FILE: adapter,
        ADAPTER_CONFIG_FILE: adapter_config,
    }
    if control.to_json() != (left := mailbox.read_control()) and (left is not None or control != Control()):
        mailbox.write_control(control.to_json(), expected=left)  # where a founding was interrupted, one may be there
    rows = [history.row(record, None)]
    mailbox.publish(0, files, root_files(spec, record, rows, {}, adapter_config, card))
    mailbox.housekeep(0, clients=0, keep_rounds=0, tag=True)
    return record
