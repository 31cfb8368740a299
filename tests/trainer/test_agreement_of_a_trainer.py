"""A Trainer's `train()` is its consent: what it takes part in is logged and kept, and another spec refused later."""

import dataclasses
import json

import pytest
from tiny_federation import found, make_trainer, run

from fedfstq_hf.errors import MailboxError
from fedfstq_hf.federation.spec import FederationSpec


def _with_staleness(data, rounds):
    spec = FederationSpec.from_json(data)
    return dataclasses.replace(spec, method=dataclasses.replace(spec.method, max_staleness=rounds)).to_json()


def test_a_trainer_says_and_keeps_what_it_takes_part_in(tmp_path, caplog):
    mailbox = found(tmp_path / "box", min_clients=1)
    with caplog.at_level("INFO", logger="fedfstq_hf"):
        run(tmp_path, mailbox)
    assert "Training: up to 2 rounds of 2 steps with your optimizer, objective full" in caplog.text
    kept = json.loads((tmp_path / "a.fedfstq/agreement.json").read_text())
    assert kept["spec"]["rounds"] == 2
    caplog.clear()
    with caplog.at_level("INFO", logger="fedfstq_hf"):
        make_trainer(tmp_path, mailbox).train()
    assert "Training: up to" not in caplog.text

    path = tmp_path / "box/rounds/000000/spec.json"
    path.write_bytes(_with_staleness(path.read_bytes(), 5))
    with pytest.raises(MailboxError, match=r"spec\.json: method.max_staleness is 5, agreed was 0"):
        make_trainer(tmp_path, mailbox).train()


def test_another_state_folder_is_another_client(tmp_path):
    mailbox = found(tmp_path / "box", min_clients=1)
    run(tmp_path, mailbox, state_dir=str(tmp_path / "state"))
    assert (tmp_path / "state/agreement.json").is_file()
    assert not (tmp_path / "a.fedfstq").exists()


def test_a_client_that_cannot_join_has_agreed_to_nothing(tmp_path):
    mailbox = found(tmp_path / "box", min_clients=1, base_fingerprint={"hidden_size": 7})
    with pytest.raises(ValueError, match="hidden_size"):
        make_trainer(tmp_path, mailbox).train()
    assert not (tmp_path / "a.fedfstq").exists()
