"""Taking part through a mailbox: waiting, posting, settling, and fetching only what changed."""

import pytest
import torch
from light import SCHEMA, LightClient, NothingToDo, fake_training, found, run_rounds

from fedfstq_hf.codec.budget import MessageBudget, open_budget
from fedfstq_hf.errors import BudgetError, MailboxError, UpdateConflictError
from fedfstq_hf.federation.client.participation import MailboxParticipation, local_seed
from fedfstq_hf.federation.mailbox.folder import FolderMailbox
from fedfstq_hf.federation.record import RoundRecord
from fedfstq_hf.federation.server.coordinator import Coordinator


def test_the_seed_depends_on_seed_client_and_round_alone():
    seeds = {local_seed(seed, client, round) for seed in (0, 1) for client in ("a", "b") for round in (0, 1, 2)}
    assert len(seeds) == 12
    assert local_seed(0, "a", 0) == local_seed(0, "a", 0) < 2**32


def test_an_assignment_says_all_that_training_needs(tmp_path):
    mailbox = found(tmp_path, local_steps=7)
    client = LightClient(mailbox, "a", tmp_path / "a")
    assignment = client.participation.next()
    record = RoundRecord.from_json(mailbox.read(0, "round.json"))
    assert (assignment.round, assignment.global_step) == (0, 0)
    assert assignment.adapter_sha256 == record.adapter_sha256
    assert record.adapter_digest == SCHEMA.digest(assignment.adapter)
    assert assignment.seed == local_seed(0, "a", 0)
    assert torch.equal(assignment.adapter, Coordinator(mailbox).adapter)


def test_what_is_logged(tmp_path):
    mailbox = found(tmp_path)
    client = LightClient(mailbox, "a", tmp_path / "a")
    assignment = client.participation.next()
    logged = client.participation.complete(assignment, fake_training(assignment.adapter, assignment.seed, {}))
    size = mailbox.list_updates(0)[0].num_bytes
    down = sum(len(mailbox.read(0, name)) for name in ("adapter_model.safetensors", "round.json"))
    expected = {"fed_round": 0, "fed_uplink_bytes": size, "fed_downlink_bytes": down, "fed_residual_norm": 0.0}
    assert logged == expected


def test_a_client_waits_between_rounds_and_ends_with_the_federation(tmp_path):
    mailbox = found(tmp_path)
    coordinator = Coordinator(mailbox)
    one, two = (LightClient(mailbox, name, tmp_path / name) for name in "ab")
    assert one.step()
    assert not one.step()  # nothing to do until round 1
    with pytest.raises(NothingToDo):
        one.participation.next()
    run_rounds(coordinator, [one, two])
    assert (one.done, two.done) == (True, True)
    assert [s.outcome for s in one.participation.settlements] == ["accepted", "accepted"]
    assert torch.equal(one.participation.final_adapter(), coordinator.adapter)


def test_a_client_that_joins_late_begins_with_the_newest_round(tmp_path):
    mailbox = found(tmp_path, rounds=4, local_steps=5)
    coordinator = Coordinator(mailbox)
    run_rounds(coordinator, [LightClient(mailbox, name, tmp_path / name) for name in "ab"], 2)
    late = LightClient(mailbox, "c", tmp_path / "c")
    assignment = late.participation.next()
    assert (assignment.round, assignment.global_step) == (2, 10)
    assert torch.equal(assignment.adapter, coordinator.adapter)


def test_a_client_that_joins_a_finished_federation_gets_its_adapter(tmp_path):
    mailbox = found(tmp_path)
    coordinator = Coordinator(mailbox)
    run_rounds(coordinator, [LightClient(mailbox, name, tmp_path / name) for name in "ab"])
    late = LightClient(mailbox, "c", tmp_path / "c")
    assert late.participation.next() is None
    assert torch.equal(late.participation.final_adapter(), coordinator.adapter)


def test_the_update_of_a_missed_round_is_late_and_the_next_one_takes_its_place(tmp_path, caplog):
    mailbox = found(tmp_path, rounds=3)
    coordinator = Coordinator(mailbox)
    slow, *others = (LightClient(mailbox, name, tmp_path / name) for name in "abc")
    assignment = slow.participation.next()
    run_rounds(coordinator, others, 1)
    result = fake_training(assignment.adapter, assignment.seed, {})
    slow.participation.complete(assignment, result)
    assert [ref.client_id for ref in mailbox.list_updates(0)] == ["a", "b", "c"]
    following = slow.participation.next()
    assert slow.participation.settlements[0].outcome == "late"
    assert "The update of round 0 was late; it is not sent again: the next round's training takes" in caplog.text
    assert (following.round, slow.session.residual) == (1, None)
    result = fake_training(following.adapter, following.seed, {})
    slow.participation.complete(following, result)
    assert torch.equal(slow.session.pending.corrected, result.adapter - following.adapter)


def test_a_refused_update_is_reported_with_its_reason(tmp_path, caplog):
    mailbox = found(tmp_path, codec="topk", max_message_bytes=300, min_clients=1)
    large = LightClient(mailbox, "a", tmp_path / "a", max_bytes=400)
    small = LightClient(mailbox, "b", tmp_path / "b", max_bytes=300)
    run_rounds(Coordinator(mailbox), [large, small], 1)
    (settlement,) = large.participation.settlements
    assert settlement.outcome == "refused"
    assert "this federation takes at most 300" in settlement.reason
    assert f"was refused: {settlement.reason[:-1]}; it is not sent again" in caplog.text
    assert [s.outcome for s in small.participation.settlements] == ["accepted"]


def test_a_restarted_client_sends_the_same_bytes_again(tmp_path, monkeypatch):
    mailbox = found(tmp_path)
    client = LightClient(mailbox, "a", tmp_path / "a")
    with monkeypatch.context() as patch:
        patch.setattr(FolderMailbox, "post_update", _unreachable)
        with pytest.raises(MailboxError, match="away"):
            client.step()
    assert mailbox.list_updates(0) == []
    stored = client.session.pending.message
    client.session.close()
    again = LightClient(mailbox, "a", tmp_path / "a")
    assert not again.step()
    (ref,) = mailbox.list_updates(0)
    assert mailbox.read_update(ref, max_bytes=ref.num_bytes) == stored


def _unreachable(*arguments, **options):
    raise MailboxError("The mailbox is away.")


def test_a_client_that_was_killed_before_it_posted_and_missed_the_round_keeps_what_it_owed(tmp_path, monkeypatch):
    mailbox = found(tmp_path, rounds=4, codec="topk")
    members = [LightClient(mailbox, name, tmp_path / name, max_bytes=400) for name in "abc"]
    client, coordinator = members[0], Coordinator(mailbox)
    run_rounds(coordinator, members[:2], 1)
    coordinator.close_round()
    with monkeypatch.context() as patch:
        patch.setattr(FolderMailbox, "post_update", _unreachable)
        with pytest.raises(MailboxError):
            client.step()
    owed = client.session.residual.clone()
    assert owed.any()
    client.session.close()
    run_rounds(coordinator, members[1:], 1)
    again = LightClient(mailbox, "a", tmp_path / "a", max_bytes=400)
    assert again.participation.next().round == 3
    assert torch.equal(again.session.residual, owed)


def test_an_id_in_use_twice_is_named(tmp_path):
    mailbox = found(tmp_path)
    LightClient(mailbox, "a", tmp_path / "one").step()
    mailbox.path.joinpath("updates/000000/a.safetensors").write_bytes(b"of the other one")
    with pytest.raises(UpdateConflictError, match="Is a second process running under the same client_id"):
        LightClient(mailbox, "a", tmp_path / "two").step()


def test_giving_up_says_what_to_look_at(tmp_path):
    mailbox = found(tmp_path)
    client = LightClient(mailbox, "a", tmp_path / "a")
    client.step()
    waiting = MailboxParticipation(
        mailbox,
        client.session,
        budget=MessageBudget(),
        wait_seconds=0.0,
        poll_seconds=0.001,
        sleep=lambda seconds: None,
    )
    with pytest.raises(
        MailboxError, match=r"No new round in .* for 0 s after round 0\. Is `fedfstq serve .*nothing is lost"
    ):
        waiting.next()


def test_polls_are_spread_and_grow_rarer_while_nothing_happens(tmp_path):
    mailbox = found(tmp_path)
    client = LightClient(mailbox, "a", tmp_path / "a")
    client.step()
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        if len(slept) == 50:
            raise NothingToDo

    waiting = MailboxParticipation(mailbox, client.session, budget=MessageBudget(), poll_seconds=2.0, sleep=sleep)
    with pytest.raises(NothingToDo):
        waiting.next()
    assert 1.0 <= slept[0] <= 3.0
    assert all(1.0 <= seconds <= 24.0 for seconds in slept)
    assert sum(slept[-10:]) > 3 * sum(slept[:3])
    assert len(set(slept)) > 10


# What is downloaded: see also test_downlink.py


def test_a_damaged_adapter_is_refused(tmp_path):
    mailbox = found(tmp_path)
    path = tmp_path / "rounds/000000/adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    with pytest.raises(MailboxError, match="damaged or was edited"):
        LightClient(mailbox, "a", tmp_path / "a").step()


def test_no_federation_is_named(tmp_path):
    mailbox = found(tmp_path / "box")
    client = LightClient(mailbox, "a", tmp_path / "a")
    client.participation.mailbox = FolderMailbox(tmp_path / "elsewhere")
    with pytest.raises(MailboxError, match=r"elsewhere holds no federation\. Check the address, or make one with"):
        client.participation.next()


def test_messages_stay_within_their_budget(tmp_path):
    mailbox = found(tmp_path, rounds=3, codec="topk")
    clients = [LightClient(mailbox, "a", tmp_path / "a", max_bytes=280), LightClient(mailbox, "b", None, max_bytes=420)]
    run_rounds(Coordinator(mailbox), clients)
    for round in range(3):
        sizes = {ref.client_id: ref.num_bytes for ref in mailbox.list_updates(round)}
        assert sizes["a"] <= 280 < sizes["b"] <= 420
    assert SCHEMA.num_params * 4 > 420


def test_a_share_too_small_for_a_message_is_refused_before_training_and_nothing_is_lost(tmp_path):
    mailbox = found(tmp_path, min_clients=1, codec="topk")
    budget = open_budget("round:900B", SCHEMA.num_params)
    clients = [LightClient(mailbox, name, tmp_path / name, budget=budget) for name in "abcd"]
    for client in clients:
        assert client.step()
    Coordinator(mailbox).close_round()
    with pytest.raises(BudgetError, match=r"budget of 225 bytes.*expected to have 4 messages: raise it by 4 times"):
        clients[0].step()
    clients[0].session.close()
    again = LightClient(mailbox, "a", tmp_path / "a", budget=open_budget("600B", SCHEMA.num_params))
    assert again.step()
    assert mailbox.list_updates(1)[0].client_id == "a"


def test_a_budget_that_holds_no_message_is_refused_at_once(tmp_path):
    mailbox = found(tmp_path, min_clients=4, codec="topk")
    for text, hint in (("100B", "100 bytes"), ("round:400B", "100 bytes.*expected to have 4 messages")):
        with pytest.raises(BudgetError, match=hint):
            LightClient(mailbox, "a", None, budget=open_budget(text, SCHEMA.num_params))
