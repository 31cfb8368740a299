"""Refinements around what happens to a federation: stops, rollbacks, restarts and keys."""

import hashlib

import pytest
import torch
from light import run_rounds
from light_refining import (
    REFINED,
    RefiningClient,
    clients,
    close,
    federation,
    level,
    previews,
    refinements,
    second_round,
    write,
)

from fedfstq_hf.codec import message
from fedfstq_hf.errors import MailboxError
from fedfstq_hf.federation import keys
from fedfstq_hf.federation.control import Enrolment
from fedfstq_hf.federation.record import RoundRecord
from fedfstq_hf.federation.server.coordinator import Coordinator
from fedfstq_hf.federation.server.open_round import Inbox
from fedfstq_hf.federation.spec import FederationSpec

ALICE, BOSS = keys.KeyPair(b"\1" * 32), keys.KeyPair(b"\2" * 32)


def read_record(mailbox, round):
    return RoundRecord.from_json(mailbox.read(round, "round.json"))


def named(entries):
    return [(entry.client_id, entry.round, entry.refinement) for entry in entries]


# Which lie there


def test_a_round_has_the_refinements_of_the_one_before(tmp_path):
    mailbox, coordinator = second_round(tmp_path)
    assert coordinator._round.inbox.refinements() == []
    refinements(mailbox, 0, b=5, a=1)
    refinements(mailbox, 1, a=7)
    found = coordinator._round.inbox.refinements()
    assert [(ref.client_id, ref.round, ref.refinement) for ref in found] == [("a", 0, True), ("b", 0, True)]
    first = coordinator._round.inbox.of(0)
    assert [(ref.client_id, ref.refinement) for ref in first] == [
        ("a", False),
        ("b", False),
    ]


def test_the_first_round_and_a_federation_without_refinements_have_none(tmp_path):
    mailbox, coordinator = second_round(tmp_path / "refines")
    refinements(mailbox, 0, a=1)
    first = Inbox(mailbox, coordinator.spec, 0, coordinator._record, max_bytes=4096)
    assert first.refinements() == first.late_refinements(8) == []
    mailbox, coordinator = second_round(tmp_path / "plain", refinement_budget=None, preview_step=1.0, expected=3.5)
    refinements(mailbox, 0, a=1)
    assert coordinator._round.inbox.refinements() == []
    assert close(coordinator) == 3.5
    assert coordinator.record.updates == coordinator.record.accepted


# Stop


def test_stop_uses_the_refinements_that_have_arrived(tmp_path):
    mailbox, coordinator = second_round(tmp_path)
    refinements(mailbox, 0, a=1, b=5)
    record = coordinator.stop()
    assert (record.round, record.finished) == (2, True)
    assert [u.client_id for u in record.refinements] == ["a", "b"]
    assert level(coordinator) == 4


def test_stop_counts_the_last_previews_in_full_and_what_nobody_waits_for_any_more_in_bytes(tmp_path):
    mailbox = federation(tmp_path / "fed")
    coordinator = Coordinator(mailbox)
    previews(mailbox, 0, a=2, b=4)
    refinements(mailbox, 0, a=10)
    record = coordinator.stop()
    assert level(coordinator) == (2 + 3 * 4) / 4
    (unused,) = record.refused
    assert (unused.client_id, unused.refinement, unused.round) == ("a", True, None)
    assert unused.reason == "The federation was stopped, and this round's previews count in full."
    assert record.uplink_bytes == sum(update.num_bytes for update in record.accepted) + unused.num_bytes


def test_stop_without_further_previews_still_puts_the_refinements_in_their_place(tmp_path):
    mailbox = federation(tmp_path)
    coordinator = Coordinator(mailbox)
    previews(mailbox, 0, a=2, b=4)
    assert close(coordinator) == 1.75
    refinements(mailbox, 0, a=1, b=5)
    record = coordinator.stop()
    assert (record.finished, record.accepted) == (True, ())
    assert level(coordinator) == 4


def test_real_clients_end_with_a_stopped_federation(tmp_path):
    mailbox = federation(tmp_path, codec="topk")
    coordinator, members = Coordinator(mailbox), clients(mailbox, tmp_path, "ab")
    run_rounds(coordinator, members, 2)
    coordinator.stop()
    for client in members:
        client.step()
        assert client.done
        assert torch.equal(client.participation.final_adapter(), coordinator.adapter)
        assert [s.outcome for s in client.participation.settlements] == ["accepted"] * 3


# Rollback


def test_refinements_that_wait_are_refused_by_a_rollback(tmp_path):
    mailbox, coordinator = second_round(tmp_path)
    refinements(mailbox, 0, a=1, b=5)
    record = coordinator.rollback(0)
    assert named(record.refused) == [("a", None, False), ("b", None, False), ("a", 0, True), ("b", 0, True)]
    assert {entry.reason for entry in record.refused} == {"Rolled back to round 0."}
    assert level(coordinator) == 0


def test_refinements_that_came_too_late_are_counted_by_a_rollback(tmp_path):
    mailbox, coordinator = second_round(tmp_path)
    assert close(coordinator) == 3.5
    refinements(mailbox, 0, b=100)
    refinements(mailbox, 1, a=100)
    record = coordinator.rollback(0)
    assert named(record.late) == [("b", 0, True)]
    assert named(record.refused) == [("a", 1, True)]


def test_what_was_rolled_back_never_comes_again(tmp_path):
    mailbox, coordinator = second_round(tmp_path)
    refinements(mailbox, 0, a=1, b=5)
    coordinator.rollback(0)
    refinements(mailbox, 1, a=100, b=100)  # of previews that were refused
    previews(mailbox, 2, a=2, b=2)
    assert close(coordinator) == 1
    assert coordinator.record.refinements == ()
    previews(mailbox, 3, a=0, b=0)
    assert close(coordinator) == 2  # from there on it is as always
    assert named(coordinator.record.late) == [("a", 1, True), ("b", 1, True)]
    assert coordinator.record.refused == ()


def test_after_a_rollback_refinements_are_used_as_before(tmp_path):
    mailbox, coordinator = second_round(tmp_path)
    assert close(coordinator) == 3.5
    coordinator.rollback(1)
    assert level(coordinator) == 1.75
    previews(mailbox, 3, a=2, b=2)
    assert close(coordinator) == 2.75
    refinements(mailbox, 3, a=4, b=4)
    previews(mailbox, 4, a=0, b=0)
    assert close(coordinator) == 1.75 + 4


def test_twice_in_a_row_no_refinement_is_counted_twice(tmp_path):
    mailbox, coordinator = second_round(tmp_path)
    refinements(mailbox, 0, a=1, b=5)
    refinements(mailbox, 1, a=1)
    records = [coordinator.rollback(0), coordinator.rollback(0)]
    previews(mailbox, 3, a=0, b=0)
    close(coordinator)
    refused = [entry for record in (*records, coordinator.record) for entry in named(record.refused)]
    assert [entry for entry in refused if entry[2]] == [("a", 0, True), ("b", 0, True), ("a", 1, True)]
    assert coordinator.record.late == ()


# Restarts


@pytest.mark.parametrize("server", [{"optimizer": "SGD", "lr": 1.0}, {"optimizer": "Adam", "lr": 0.01}])
def test_a_coordinator_that_is_started_anew_for_each_round_gives_the_same_bits(tmp_path, server):
    def run(path, restarted):
        mailbox = federation(path, codec="topk", rounds=4, salt="same", server=server)
        coordinator, members = Coordinator(mailbox, clock=lambda: 0.0), clients(mailbox, path, "ab")
        while not coordinator.finished:
            for client in members:
                client.step()
            if restarted:
                coordinator = Coordinator(mailbox, clock=lambda: 0.0)
            assert coordinator.close_round() is not None
        return [mailbox.read(round, name) for round in range(5) for name in ("round.json", "adapter_model.safetensors")]

    straight = run(tmp_path / "straight", False)
    assert run(tmp_path / "restarted", True) == straight
    assert len(RoundRecord.from_json(straight[-2]).refinements) == 2


def test_the_order_of_arrival_does_not_matter(tmp_path):
    found = []
    for order in ("abc", "cba"):
        mailbox = federation(tmp_path / order, salt="same", weights="precision")
        coordinator = Coordinator(mailbox)
        previews(mailbox, 0, **{name: ord(name) / 97 for name in order})
        close(coordinator)
        refinements(mailbox, 0, **{name: ord(name) / 98 for name in order})
        previews(mailbox, 1, **dict.fromkeys(order, 0.3))
        close(coordinator)
        found.append(coordinator.record.adapter_sha256)
    assert found[0] == found[1]


def test_of_two_coordinators_one_gives_way(tmp_path, caplog):
    mailbox, first = second_round(tmp_path)
    refinements(mailbox, 0, a=1, b=5)
    second = Coordinator(mailbox)
    assert close(first) == 4
    assert close(second) == 4
    assert "Another coordinator published round 2 first" in caplog.text
    assert second.record == first.record


# Keys


def test_signed_and_sealed_refinements_are_used(tmp_path):
    enrolled = {"a": Enrolment(verify_key=ALICE.verify_key)}
    settings = REFINED | {"rounds": 3, "min_clients": 1, "signatures": True, "sealing_key": BOSS.seal_key}
    mailbox = federation(tmp_path, enrolled=enrolled, **settings)
    coordinator = Coordinator(mailbox, unseal=lambda data: keys.unseal(BOSS, data))
    client = RefiningClient(mailbox, "a", None, preview=600, refinement=690)
    client.session._sign = keys.signer(ALICE, coordinator.spec.id)
    assert client.step()
    pending = client.session.pending
    assert message.is_sealed(pending.refinement)
    opened = message.unpack_signed(keys.unseal(BOSS, pending.refinement))
    keys.verify(ALICE.verify_key, coordinator.spec.id, opened.digest, opened.signature)
    assert len(pending.message) <= 600 < len(pending.refinement) <= 690
    run_rounds(coordinator, [client])
    for record in (read_record(mailbox, 2), read_record(mailbox, 3)):
        assert [(u.client_id, u.signed) for u in record.refinements] == [("a", True)]
        assert record.refused == ()
    assert read_record(mailbox, 2).refinements[0].sha256 == hashlib.sha256(pending.refinement).hexdigest()


def test_an_unsigned_refinement_is_refused_and_the_signed_preview_stands_in(tmp_path):
    enrolled = {"a": Enrolment(verify_key=ALICE.verify_key)}
    mailbox = federation(tmp_path, enrolled=enrolled, signatures=True, min_clients=1)
    coordinator = Coordinator(mailbox)
    sign = keys.signer(ALICE, FederationSpec.from_json(mailbox.read(0, "spec.json")).id)
    for round, value in ((0, 2), (1, 0)):
        mailbox.post_update(round, "a", write(mailbox, "a", value, round, sign=sign))
        mailbox.post_update(0, "a", write(mailbox, "a", 100, 0, refinement=True), refinement=True)
        close(coordinator)
    assert level(coordinator) == 2
    (entry,) = coordinator.record.refused
    assert (entry.refinement, entry.reason) == (True, "It is not signed; client a is enrolled with a verify key.")


def test_a_client_that_trains_in_every_other_round_is_refined_too(tmp_path):
    mailbox = federation(tmp_path, codec="topk", rounds=4, min_clients=1)
    coordinator = Coordinator(mailbox)
    one, two = clients(mailbox, tmp_path, "ab")
    for client in (one, two, one, two):
        assert client.step()
        assert coordinator.close_round() is not None
    records = [read_record(mailbox, round) for round in range(1, 5)]
    assert [[u.client_id for u in record.refinements] for record in records] == [[], ["a"], ["b"], ["a"]]


def test_a_rollback_drops_what_clients_carry_from_undone_rounds(tmp_path):
    """They have no residual; token sensitivities and the like were measured on an adapter that did not happen."""
    mailbox = federation(tmp_path, codec="topk")
    coordinator, members = Coordinator(mailbox), clients(mailbox, tmp_path, "ab")
    run_rounds(coordinator, members, 1)
    coordinator.rollback(0)
    assignment = members[0].participation.next()
    assert (assignment.round, members[0].session.residual) == (2, None)
    assert [s.outcome for s in members[0].participation.settlements] == ["accepted", "refused"]
    assert members[0].session.carried == {}


def test_a_finished_federation_cannot_be_refined_further(tmp_path):
    mailbox, coordinator = second_round(tmp_path, rounds=2)
    refinements(mailbox, 0, a=1, b=5)
    assert close(coordinator) == 4
    assert coordinator.finished
    refinements(mailbox, 1, a=100)  # of the last round, where there are none
    with pytest.raises(MailboxError, match="is finished already"):
        Coordinator(mailbox).stop()
