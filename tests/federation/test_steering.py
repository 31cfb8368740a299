"""What may change after the founding: who is on the list, how many rounds, and when they close."""

import pytest
import torch
from light import LightClient, found, make_spec, run_rounds
from light_updates import delta, post

from fedfstq_hf.errors import ConfigError, MailboxError
from fedfstq_hf.federation import control
from fedfstq_hf.federation.control import Control, change_control
from fedfstq_hf.federation.record import RoundRecord
from fedfstq_hf.federation.server.coordinator import Coordinator
from fedfstq_hf.reporting.status import render_status


def extended(mailbox, **changes):
    spec = Coordinator(mailbox).spec
    return change_control(mailbox, control.extend(spec, **changes))


def test_further_rounds(tmp_path):
    mailbox = found(tmp_path / "box", rounds=2, server={"optimizer": "SGD", "lr": 1.5, "final_lr": 1.0})
    coordinator = Coordinator(mailbox)
    clients = [LightClient(mailbox, name, tmp_path / name) for name in "ab"]
    run_rounds(coordinator, clients, 1)
    extended(mailbox, rounds=4)
    run_rounds(coordinator, clients, 3)
    assert [Coordinator(mailbox).record.round, coordinator.finished] == [4, True]
    for client in clients:
        assert torch.equal(client.participation.final_adapter(), coordinator.adapter)
    late = LightClient(mailbox, "c", tmp_path / "c")
    assert late.participation.total_steps == 4
    assert "4 rounds of 1 local steps" in render_status(mailbox)
    assert "round 4/4" in render_status(mailbox)


def test_fewer_rounds_end_it_with_the_next_one(tmp_path):
    mailbox = found(tmp_path / "box", rounds=9)
    coordinator = Coordinator(mailbox)
    clients = [LightClient(mailbox, name, tmp_path / name) for name in "ab"]
    run_rounds(coordinator, clients, 2)
    extended(mailbox, rounds=1)
    run_rounds(coordinator, clients, 1)
    assert (coordinator.record.round, coordinator.finished) == (3, True)


def test_fewer_updates_close_a_round(tmp_path):
    mailbox = found(tmp_path, min_clients=3)
    post(mailbox, "a", delta(1))
    coordinator = Coordinator(mailbox)
    assert not coordinator.ready()
    extended(mailbox, min_clients=1)
    assert coordinator.ready()
    assert coordinator.close_round().round == 1
    assert "waiting for 1 updates" in render_status(mailbox)


def test_a_deadline_from_the_next_round_on_and_none_again(tmp_path):
    mailbox = found(tmp_path, min_clients=1, rounds=5)
    coordinator = Coordinator(mailbox, clock=lambda: 100.0)
    deadlines = []
    for round, seconds in enumerate((60, None, 0)):
        post(mailbox, "a", delta(1), round=round)
        if seconds is not None:
            extended(mailbox, round_seconds=seconds)
        deadlines.append(coordinator.close_round().deadline)
    assert deadlines == [160.0, 160.0, None]


@pytest.mark.parametrize(
    ("spec", "present", "changes", "said"),
    [
        (
            {},
            Control(clients={"a": control.Enrolment()}),
            {"min_clients": 2},
            "min_clients is 2, but 1 clients are asked",
        ),
        ({"clients_per_round": 2}, Control(), {"min_clients": 3}, "min_clients is 3, but 2 clients are asked"),
        ({"training": {"lr_scheduler_type": "linear"}}, Control(), {"rounds": 9}, "schedule 'linear', which ends with"),
        ({}, Control(), {"rounds": 0}, "rounds must be a whole number of at least 1"),
        ({}, Control(), {"round_seconds": -1.0}, "round_seconds must be a number of at least 0"),
        ({}, Control(), {"min_clients": "two"}, "min_clients must be a whole number"),
    ],
)
def test_what_could_not_work_is_refused(spec, present, changes, said):
    with pytest.raises(ConfigError, match=said):
        control.extend(make_spec(**spec), **changes)(present)


def test_changes_are_kept_in_the_control_file_and_hostile_ones_refused():
    changed = control.extend(make_spec(), rounds=7, min_clients=1, round_seconds=5.0)(Control(paused="why"))
    assert Control.from_json(changed.to_json()) == changed
    assert b"rounds" not in Control().to_json()
    for bad in (b'"rounds": -1', b'"rounds": "x"', b'"min_clients": 1.5', b'"round_seconds": 1e999'):
        with pytest.raises(MailboxError):
            Control.from_json(b'{"clients": null, "format": 1, "paused": null, ' + bad + b"}")


def test_a_list_that_could_close_no_round_is_refused():
    three = control.enrol(["a", "b", "c"])(Control())
    assert set(control.dismiss(["a"], 2)(three).clients) == {"b", "c"}
    with pytest.raises(ConfigError, match=r"1 clients would be left, but 2 updates close a round.*--min-clients 1"):
        control.dismiss(["a", "b"], 2)(three)
    assert control.reopen(three).clients is None


def test_an_extended_federation_goes_on_for_who_starts_again(tmp_path):
    mailbox = found(tmp_path / "box", rounds=1, min_clients=1)
    first = LightClient(mailbox, "a", tmp_path / "a")
    assert first.participation.total_steps == 1
    first.step()
    extended(mailbox, rounds=2)
    record = Coordinator(mailbox).close_round()
    assert not RoundRecord.from_json(mailbox.read(1, "round.json")).finished
    assert not record.finished
    first.session.close()
    again = LightClient(mailbox, "a", tmp_path / "a")
    assert (again.participation.total_steps, again.participation.next().round) == (2, 1)


def test_pruned_rounds_keep_what_clients_need(tmp_path):
    mailbox = found(tmp_path / "box", rounds=6, codec="topk", downlink="exact")
    coordinator = Coordinator(mailbox)
    clients = [LightClient(mailbox, name, tmp_path / name, max_bytes=300) for name in "ab"]
    run_rounds(coordinator, clients, 1)
    away = LightClient(mailbox, "c", tmp_path / "c", max_bytes=300)
    run_rounds(coordinator, clients, 4)
    size = (tmp_path / "box/rounds/000001/adapter_model.safetensors").stat().st_size
    assert mailbox.prune(2) >= 3 * size
    assert mailbox.prune(2) == 0
    kept = {path.parent.name for path in (tmp_path / "box/rounds").glob("*/adapter_model.safetensors")}
    assert kept == {"000000", "000004", "000005"}
    assert torch.equal(away.participation.next().adapter, coordinator.adapter)
    with pytest.raises(MailboxError, match=r"Round 2 of .* it was pruned"):
        Coordinator(mailbox).rollback(2)
    run_rounds(Coordinator(mailbox), clients, 1)
    assert "round 6/6" in render_status(mailbox)
