"""Ending a federation by hand, and going back to an earlier round; also against a coordinator that runs meanwhile."""

import pytest
import torch
from light import SCHEMA, LightClient, adapter_sha256, found, run_rounds
from light_updates import delta, make_message, ones, post

from fedfstq_hf.errors import MailboxError
from fedfstq_hf.federation import control
from fedfstq_hf.federation.mailbox.folder import FolderMailbox
from fedfstq_hf.federation.record import RoundRecord
from fedfstq_hf.federation.server.coordinator import Coordinator

MOMENTUM = {"optimizer": "SGD", "lr": 0.9, "momentum": 0.5}


def clients(mailbox, path, names, max_bytes=400):
    return [LightClient(mailbox, name, path / name, max_bytes=max_bytes) for name in names]


def read_record(mailbox, round):
    return RoundRecord.from_json(mailbox.read(round, "round.json"))


# Stop


def test_stop_uses_what_has_arrived_and_is_the_end(tmp_path):
    mailbox = found(tmp_path, rounds=9, min_clients=3)
    coordinator = Coordinator(mailbox)
    post(mailbox, "a", delta(1))
    start = coordinator.adapter.clone()
    record = coordinator.stop()
    assert (record.round, record.finished, [u.client_id for u in record.accepted]) == (1, True, ["a"])
    assert torch.equal(coordinator.adapter, start + delta(1))
    assert adapter_sha256(tmp_path) == record.adapter_sha256
    assert record.deadline is None
    with pytest.raises(MailboxError, match="is finished already; it cannot be stopped"):
        coordinator.stop()
    with pytest.raises(MailboxError, match="is finished already; it cannot be rolled back"):
        coordinator.rollback(0)


def test_stop_without_updates_leaves_the_adapter(tmp_path):
    mailbox = found(tmp_path, rounds=9, server=MOMENTUM)
    coordinator = Coordinator(mailbox)
    before = coordinator.record.adapter_sha256
    record = coordinator.stop()
    assert (record.round, record.finished, record.accepted) == (1, True, ())
    assert record.adapter_sha256 == before


def test_clients_end_with_a_stopped_federation(tmp_path):
    mailbox = found(tmp_path, rounds=9, codec="topk", round_seconds=60.0)
    one, two = clients(mailbox, tmp_path, "ab")
    coordinator = Coordinator(mailbox)
    run_rounds(coordinator, [one, two], 1)
    one.step()
    coordinator.stop()
    for client in (one, two):
        client.step()
        assert client.done
        assert torch.equal(client.participation.final_adapter(), coordinator.adapter)
    assert [s.outcome for s in one.participation.settlements] == ["accepted", "accepted"]


def test_a_paused_federation_can_be_stopped(tmp_path):
    mailbox = found(tmp_path, rounds=9)
    control.change_control(mailbox, control.pause("for good"))
    assert Coordinator(mailbox).stop().finished


def test_stop_while_another_coordinator_publishes(tmp_path, caplog):
    """The round is taken at the last moment: it is still the federation that ends, one round later."""
    mailbox = found(tmp_path, rounds=9)
    stopping, serving = Coordinator(mailbox), Coordinator(FolderMailbox(tmp_path, durable=False))
    for name in "ab":
        post(mailbox, name, ones(1))
    served = serving.close_round()
    record = stopping.stop()
    assert "Another coordinator published round 1 first" in caplog.text
    assert (served.round, record.round, record.finished) == (1, 2, True)
    assert record.accepted == ()  # each update was used once
    assert serving.serve(once=True) == record


# Rollback


def served(path, rounds, **changes):
    """A federation after some rounds, its clients and coordinator."""
    mailbox = found(path, rounds=9, codec="topk", server=MOMENTUM, **changes)
    coordinator, members = Coordinator(mailbox), clients(mailbox, path, "ab")
    run_rounds(coordinator, members, rounds)
    return mailbox, coordinator, members


@pytest.mark.parametrize("to", [0, 1, 2])
def test_rollback_publishes_the_adapter_of_that_round(tmp_path, to):
    mailbox, coordinator, _ = served(tmp_path, 3)
    record = coordinator.rollback(to)
    assert (record.round, record.restored_from, record.finished) == (4, to, False)
    assert record.adapter_sha256 == read_record(mailbox, to).adapter_sha256 == adapter_sha256(tmp_path)
    assert mailbox.read(4, "adapter_model.safetensors") == mailbox.read(to, "adapter_model.safetensors")
    assert coordinator.serve(once=True) == record


def test_after_a_rollback_everything_goes_on_as_it_did_then(tmp_path):
    """The server optimizer's momentum goes back too: the same updates make the same step."""
    mailbox = found(tmp_path, rounds=9, server=MOMENTUM)
    coordinator = Coordinator(mailbox)
    steps = []
    for round, back in ((0, None), (1, None), (2, 1), (4, None)):
        before = coordinator.adapter.clone()
        for name in "ab":
            post(mailbox, name, delta(3), round=round)
        coordinator.close_round()
        steps.append(coordinator.adapter - before)
        if back is not None:
            coordinator.rollback(back)
    assert torch.allclose(steps[3], steps[1], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(steps[2], steps[1], rtol=1e-2)


def test_clients_that_wait_are_refused_and_go_on_from_the_restored_round(tmp_path):
    mailbox, coordinator, members = served(tmp_path, 2)
    for client in members:
        client.step()
    record = coordinator.rollback(1)
    assert [(u.client_id, u.reason) for u in record.refused] == [
        ("a", "Rolled back to round 1."),
        ("b", "Rolled back to round 1."),
    ]
    assert record.uplink_bytes == sum(ref.num_bytes for ref in mailbox.list_updates(2))
    for client in members:
        assignment = client.participation.next()
        assert (assignment.round, assignment.adapter_sha256) == (3, record.adapter_sha256)
        assert client.session.residual is None
        assert client.participation.settlements[-1].outcome == "refused"
    assert torch.equal(assignment.adapter, coordinator.adapter)


def test_the_next_round_goes_on(tmp_path):
    _, coordinator, members = served(tmp_path, 2)
    for client in members:
        client.step()
    coordinator.rollback(0)
    run_rounds(coordinator, members)
    assert coordinator.record.round == 9
    assert coordinator.finished
    assert all(client.done for client in members)


def test_late_updates_from_before_a_rollback_are_not_used_after_it(tmp_path):
    mailbox = found(tmp_path, rounds=9, max_staleness=3)
    coordinator = Coordinator(mailbox)
    bad = make_message(mailbox, "c", ones(50))
    for round in (0, 1):
        for name in "ab":
            post(mailbox, name, ones(1), round=round)
        coordinator.close_round()
    waiting = make_message(mailbox, "d", ones(50), round=1)
    mailbox.post_update(1, "d", waiting)  # lies there when the rollback comes
    record = coordinator.rollback(0)
    assert [(u.client_id, u.round) for u in record.refused] == [("d", 1)]
    mailbox.post_update(0, "c", bad)  # and this one comes after it
    for name in "ab":
        post(mailbox, name, ones(1), round=3)
    following = coordinator.close_round()
    assert [u.client_id for u in following.accepted] == ["a", "b"]
    assert [(u.client_id, u.round) for u in following.late] == [("c", 0)]
    late = make_message(mailbox, "e", ones(1), round=3)
    mailbox.post_update(3, "e", late)  # after the rollback lateness is what it was
    for name in "ab":
        post(mailbox, name, ones(1), round=4)
    assert [u.client_id for u in coordinator.close_round().accepted] == ["a", "b", "e"]


@pytest.mark.parametrize("round", [-1, 2, 3])
def test_there_is_no_going_back_to_what_is_not_past(tmp_path, round):
    mailbox, coordinator, _ = served(tmp_path, 2)
    with pytest.raises(MailboxError, match=rf"Cannot roll back to round {round}: the newest is 2\. Give .* 0 to 1"):
        coordinator.rollback(round)
    assert mailbox.head() == 2


def test_a_damaged_adapter_is_not_brought_back(tmp_path):
    mailbox, coordinator, _ = served(tmp_path, 2)
    path = tmp_path / "rounds/000001/adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    with pytest.raises(MailboxError, match="damaged or was edited"):
        coordinator.rollback(1)
    assert mailbox.head() == 2


def test_rollback_while_another_coordinator_publishes(tmp_path, caplog):
    mailbox, coordinator, members = served(tmp_path, 2)
    other = Coordinator(FolderMailbox(tmp_path, durable=False))
    for client in members:
        client.step()
    other.close_round()
    record = coordinator.rollback(1)
    assert "Another coordinator published round 3 first" in caplog.text
    assert (record.round, record.restored_from) == (4, 1)
    assert read_record(mailbox, 3).restored_from is None
    assert other.serve(once=True) == record


def test_rollback_that_loses_against_the_last_round_is_told(tmp_path):
    mailbox = found(tmp_path, rounds=2)
    coordinator, other = Coordinator(mailbox), Coordinator(mailbox)
    for name in "ab":
        post(mailbox, name, ones(1))
    other.close_round()
    coordinator.serve(once=True)
    for name in "ab":
        post(mailbox, name, ones(1), round=1)
    other.close_round()
    with pytest.raises(MailboxError, match="is finished already; it cannot be rolled back"):
        coordinator.rollback(0)


def test_rolling_back_the_last_but_one_round_ends_with_the_earlier_adapter(tmp_path):
    mailbox, coordinator, _ = served(tmp_path, 8)
    record = coordinator.rollback(3)
    assert (record.round, record.finished) == (9, True)
    assert record.adapter_sha256 == read_record(mailbox, 3).adapter_sha256


def test_twice_in_a_row(tmp_path):
    mailbox, coordinator, members = served(tmp_path, 3)
    coordinator.rollback(2)
    coordinator.rollback(0)
    assert coordinator.record.adapter_sha256 == read_record(mailbox, 0).adapter_sha256
    run_rounds(coordinator, members, 1)
    assert coordinator.record.round == 6
    assert Coordinator(mailbox).record == coordinator.record
    assert coordinator.schema.fingerprint == SCHEMA.fingerprint
