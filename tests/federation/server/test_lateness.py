"""Updates that arrive after their round: counted once, or used once; the client's residual follows what was done."""

import pytest
import torch
from light import SCHEMA, LightClient, fake_training, found, run_rounds
from light_updates import found_enrolled, make_message, ones, post

from fedfstq_hf.codec import get_codec, message
from fedfstq_hf.errors import MailboxError, UpdateConflictError
from fedfstq_hf.federation.client.participation import LocalResult, local_seed
from fedfstq_hf.federation.control import read_control
from fedfstq_hf.federation.mailbox.folder import FolderMailbox
from fedfstq_hf.federation.record import RoundRecord
from fedfstq_hf.federation.server.coordinator import Coordinator
from fedfstq_hf.federation.server.open_round import unnamed

BUDGET = 400


def close(mailbox, names, round, coordinator=None):
    """Close a round with updates of these clients."""
    for name in names:
        post(mailbox, name, ones(1), round=round)
    return (coordinator or Coordinator(mailbox)).close_round()


def late_ids(record):
    return [(update.client_id, update.round) for update in record.late]


# Refused and counted


def test_a_late_update_is_counted_once_and_never_used(tmp_path):
    mailbox = found(tmp_path, rounds=6)
    coordinator = Coordinator(mailbox)
    late = make_message(mailbox, "c", ones(9))
    assert late_ids(close(mailbox, "ab", 0, coordinator)) == []
    mailbox.post_update(0, "c", late)
    second = close(mailbox, "ab", 1, coordinator)
    (entry,) = second.late
    assert (entry.client_id, entry.round, entry.num_bytes) == ("c", 0, len(late))
    assert entry.reason == "It arrived after round 0 was closed."
    assert [update.client_id for update in second.accepted] == ["a", "b"]
    assert second.uplink_bytes == sum(ref.num_bytes for ref in mailbox.list_updates(1)) + len(late)
    for round in (2, 3):
        assert late_ids(close(mailbox, "ab", round)) == []  # also by a coordinator that was started anew


def test_an_update_that_was_used_or_refused_in_time_is_not_late(tmp_path):
    mailbox = found(tmp_path, rounds=6, max_staleness=2)
    post(mailbox, "bad", ones(1), base="0" * 64)
    records = [close(mailbox, "ab", round) for round in range(4)]
    assert [len(record.refused) for record in records] == [1, 0, 0, 0]
    assert [late_ids(record) for record in records] == [[], [], [], []]
    assert [len(record.accepted) for record in records] == [2, 2, 2, 2]


def test_a_late_message_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    mailbox = found(tmp_path, rounds=6)
    close(mailbox, "ab", 0)
    mailbox.post_update(0, "c", bytes(5000))
    read, original = [], mailbox.read_update
    monkeypatch.setattr(
        mailbox, "read_update", lambda ref, **limit: (read.append(ref.client_id), original(ref, **limit))[1]
    )
    record = close(mailbox, "ab", 1)
    assert late_ids(record) == [("c", 0)]
    assert record.late[0].sha256 == ""
    assert "c" not in read


@pytest.mark.parametrize("lag", [2, 3, 8])
def test_a_message_that_is_many_rounds_late_stands_in_one_record(tmp_path, lag):
    mailbox = found(tmp_path, rounds=20)
    late = make_message(mailbox, "c", ones(9))
    for round in range(lag):
        close(mailbox, "ab", round)
    mailbox.post_update(0, "c", late)
    records = [close(mailbox, "ab", round) for round in range(lag, lag + 3)]  # each by another coordinator
    assert [late_ids(record) for record in records] == [[("c", 0)], [], []]
    assert records[0].uplink_bytes - records[1].uplink_bytes == len(late)
    assert records[0].late[0].reason == "It arrived after round 0 was closed."
    assert [update.client_id for update in records[0].accepted] == ["a", "b"]


@pytest.mark.parametrize("end", ["closed", "stopped", "rolled back"])
def test_the_last_record_names_whatever_arrived_before_it(tmp_path, end):
    mailbox = found(tmp_path, rounds=14)
    late = make_message(mailbox, "c", ones(9))
    coordinator = Coordinator(mailbox)
    for round in range(12):
        close(mailbox, "ab", round, coordinator)
    mailbox.post_update(0, "c", late)
    assert late_ids(close(mailbox, "ab", 12, coordinator)) == []
    if end == "closed":
        record = close(mailbox, "ab", 13, coordinator)
    else:
        record = coordinator.stop() if end == "stopped" else coordinator.rollback(3)
    assert record.finished
    assert late_ids(record) == [("c", 0)]


def test_a_refinement_that_is_many_rounds_late_stands_in_one_record(tmp_path):
    mailbox = found(tmp_path, rounds=20, refinement_budget="1bpp", preview_step=0.5, error_feedback=0.0)
    late = make_message(mailbox, "a", ones(9), params=message.REFINEMENT_PARAMS)
    for round in range(5):
        close(mailbox, "ab", round)
    mailbox.post_update(0, "a", late, refinement=True)
    records = [close(mailbox, "ab", round) for round in (5, 6)]
    assert [[(u.client_id, u.round, u.refinement) for u in record.late] for record in records] == [[("a", 0, True)], []]
    assert records[0].uplink_bytes - records[1].uplink_bytes == len(late)


def test_long_after_a_round_only_clients_that_were_asked_and_are_not_named_are_looked_for(tmp_path, monkeypatch):
    """There may be thousands of others, and on the Hub each costs a request."""
    mailbox = found_enrolled(tmp_path, "abcdef", clients_per_round=3, min_clients=1, rounds=20)
    coordinator, asked = Coordinator(mailbox), []
    for round in range(4):
        first, *others = coordinator.record.selected
        asked.append((first, set(others)))
        close(mailbox, [first], round, coordinator)
    looked, original = {}, mailbox.list_updates

    def listed(round, clients=None, **options):
        looked.setdefault(round, set()).update(clients)
        return original(round, clients, **options)

    monkeypatch.setattr(mailbox, "list_updates", listed)
    close(mailbox, coordinator.record.selected[:1], 4, coordinator)
    assert [looked[round] for round in range(3)] == [others for _, others in asked[:3]]
    assert looked[3] == set("abcdef") - {asked[3][0]}


def test_each_record_is_read_once_to_find_late_messages(tmp_path):
    mailbox = found(tmp_path, rounds=20)
    for round in range(6):
        close(mailbox, "ab", round)
    read = []

    def record(round):
        read.append(round)
        return RoundRecord.from_json(mailbox.read(round, "round.json"))

    assert unnamed(6, 4, lambda round, without: mailbox.list_updates(round), record) == [
        ref for round in (2, 3, 4, 5) for ref in mailbox.list_updates(round)
    ]
    assert read == [3, 4, 5, 6]


# Used at a discount


def test_a_stale_update_is_used_once(tmp_path):
    mailbox = found(tmp_path, rounds=8, max_staleness=2)
    stale = make_message(mailbox, "c", ones(1))
    close(mailbox, "ab", 0)
    mailbox.post_update(0, "c", stale)
    records = [close(mailbox, "ab", round) for round in range(1, 5)]
    used = [[u.client_id for u in record.accepted if u.staleness] for record in records]
    assert used == [["c"], [], [], []]
    assert records[0].accepted[2].staleness == 1
    assert all(late_ids(record) == [] and record.refused == () for record in records)


def test_a_stale_update_helps_to_close_a_round(tmp_path):
    mailbox = found(tmp_path, rounds=8, max_staleness=1)
    stale = make_message(mailbox, "c", ones(1))
    coordinator = Coordinator(mailbox)
    close(mailbox, "ab", 0, coordinator)
    post(mailbox, "a", ones(1), round=1)
    assert not coordinator.ready()
    mailbox.post_update(0, "c", stale)
    assert coordinator.ready()
    assert [u.client_id for u in coordinator.close_round().accepted] == ["a", "c"]


def test_beyond_max_staleness_it_is_late(tmp_path):
    mailbox = found(tmp_path, rounds=8, max_staleness=1)
    stale = make_message(mailbox, "c", ones(1))
    for round in (0, 1):
        close(mailbox, "ab", round)
    mailbox.post_update(0, "c", stale)
    record = close(mailbox, "ab", 2)
    assert late_ids(record) == [("c", 0)]
    assert [u.client_id for u in record.accepted] == ["a", "b"]
    assert late_ids(close(mailbox, "ab", 3)) == []


def test_beside_a_newer_update_of_the_same_client_the_old_one_is_late(tmp_path):
    """Both would hold what error feedback owed in between twice."""
    mailbox = found(tmp_path, rounds=8, max_staleness=1)
    stale = make_message(mailbox, "a", ones(1))
    close(mailbox, "bc", 0)
    mailbox.post_update(0, "a", stale)
    coordinator = Coordinator(mailbox)
    post(mailbox, "a", ones(1), round=1)
    assert not coordinator.ready()  # two messages, but of one client
    record = close(mailbox, "b", 1, coordinator)
    assert [(u.client_id, u.staleness) for u in record.accepted] == [("a", 0), ("b", 0)]
    assert late_ids(record) == [("a", 0)]


def test_a_stale_update_is_screened_by_its_own_round(tmp_path):
    mailbox = found(tmp_path, rounds=8, max_staleness=1)
    wrong = make_message(mailbox, "c", ones(1), base="0" * 64)
    close(mailbox, "ab", 0)
    replayed = make_message(mailbox, "d", ones(1), round=1)
    mailbox.post_update(0, "c", wrong)
    mailbox.post_update(0, "d", replayed)
    record = close(mailbox, "ab", 1)
    assert [(u.client_id, u.round) for u in record.refused] == [("c", 0), ("d", 0)]
    assert "It names base adapter" in record.refused[0].reason
    assert record.refused[1].reason == "It names round 1; expected 0."
    assert late_ids(close(mailbox, "ab", 2)) == []


def test_a_client_that_was_not_selected_cannot_come_late_instead(tmp_path):
    """Not even where it is selected for the round that would use the stale update."""
    mailbox = found_enrolled(tmp_path, "abcd", clients_per_round=2, min_clients=1, max_staleness=1, rounds=8)
    coordinator = Coordinator(mailbox)
    first, second = coordinator.record.selected, read_control(mailbox).select(1, 0, 2)
    (uninvited,) = set(second) - set(first)
    (present,) = set(second) - {uninvited}
    data = make_message(mailbox, uninvited, ones(1))
    close(mailbox, first, 0, coordinator)
    assert coordinator.record.selected == second
    mailbox.post_update(0, uninvited, data)
    record = close(mailbox, present, 1, coordinator)
    assert [u.client_id for u in record.accepted] == [present]
    assert [(u.client_id, u.round, u.reason) for u in record.refused] == [
        (uninvited, 0, f"Client {uninvited} was not selected for this round.")
    ]


# The clients


def delayed(mailbox, path, coordinator, others):
    """A client whose message of round 0 arrives after that round; returns it."""
    slow = LightClient(mailbox, "s", path, max_bytes=BUDGET)
    assignment = slow.participation.next()
    run_rounds(coordinator, others, 1)
    slow.participation.complete(assignment, fake_training(assignment.adapter, assignment.seed, {}))
    return slow


def clients(mailbox, path, names):
    return [LightClient(mailbox, name, path / name, max_bytes=BUDGET) for name in names]


def test_a_client_settles_a_stale_update_as_accepted(tmp_path):
    mailbox = found(tmp_path, rounds=6, max_staleness=1, codec="topk")
    coordinator, others = Coordinator(mailbox), clients(mailbox, tmp_path, "ab")
    slow = delayed(mailbox, tmp_path / "s", coordinator, others)
    pending = slow.session.pending
    assert not slow.step()  # what becomes of it is not known yet, though round 1 is open
    assert slow.session.pending is pending
    run_rounds(coordinator, others, 1)
    assert [u.client_id for u in coordinator.record.accepted] == ["a", "b", "s"]
    carried = dict(slow.session.carried)
    assert slow.step()  # trains in round 2
    (settlement,) = slow.participation.settlements
    assert (settlement.round, settlement.outcome) == (0, "accepted")
    _, payload = message.unpack(pending.message)
    residual = pending.corrected - get_codec("topk").decode(payload, SCHEMA).to_dense()
    assert residual.any()
    result = fake_training(coordinator.adapter, local_seed(0, "s", 2), carried)
    assert slow.session.pending.round == 2
    assert torch.equal(slow.session.pending.corrected, result.adapter - coordinator.adapter + residual)


def test_a_client_that_is_late_again_and_again_sends_one_round_s_worth(tmp_path):
    mailbox = found(tmp_path, rounds=30, max_staleness=0)
    coordinator, others = Coordinator(mailbox), [LightClient(mailbox, name, None) for name in "ab"]
    slow = LightClient(mailbox, "s", None)

    def train(client, assignment):
        client.participation.complete(assignment, LocalResult(assignment.adapter + 0.1, None, 1, {}))

    for round in range(21):
        late = slow.participation.next()
        for client in others:
            train(client, client.participation.next())
        if round < 20:
            coordinator.close_round()
        train(slow, late)
    assert [s.outcome for s in slow.participation.settlements] == ["late"] * 20
    record = coordinator.close_round()
    norms = {u.client_id: u.norm for u in record.accepted}
    assert norms["s"] == pytest.approx(norms["a"], rel=1e-4)
    assert norms["a"] == pytest.approx(0.1 * SCHEMA.num_params**0.5, rel=1e-4)


def test_a_client_that_lost_its_state_counts_once(tmp_path, caplog):
    """Its message was there already: what it trains again for that round is neither sent nor owed."""
    mailbox = found(tmp_path / "box", rounds=6, min_clients=1, codec="topk")
    coordinator = Coordinator(mailbox)
    first = LightClient(mailbox, "a", tmp_path / "one", max_bytes=BUDGET)
    run_rounds(coordinator, [first], 1)
    accepted = first.session.pending
    again = LightClient(mailbox, "a", tmp_path / "two", max_bytes=BUDGET)
    with pytest.raises(UpdateConflictError):
        again.step()
    again.session.close()
    record = coordinator.close_round()
    assert [u.sha256 for u in record.accepted] == [accepted.sha256]
    again = LightClient(mailbox, "a", tmp_path / "two", max_bytes=BUDGET)
    assert again.session.pending.sha256 != accepted.sha256
    assignment = again.participation.next()
    (settlement,) = again.participation.settlements
    assert (settlement.round, settlement.outcome) == (1, "late")
    assert settlement.reason == "another message of this client was there"
    assert (assignment.round, again.session.residual) == (2, None)
    result = fake_training(assignment.adapter, assignment.seed, {})
    again.participation.complete(assignment, result)
    assert torch.equal(again.session.pending.corrected, result.adapter - assignment.adapter)


def test_where_late_updates_are_used_a_client_that_lost_its_state_does_not_wait_for_them(tmp_path):
    mailbox = found(tmp_path / "box", rounds=6, min_clients=1, max_staleness=3)
    coordinator = Coordinator(mailbox)
    post(mailbox, "a", ones(1))
    with pytest.raises(UpdateConflictError):
        LightClient(mailbox, "a", tmp_path / "a").step()
    coordinator.close_round()
    assert LightClient(mailbox, "a", tmp_path / "a").participation.next().round == 1


def test_a_client_that_was_away_for_long_posts_nothing_and_keeps_what_it_owed(tmp_path, monkeypatch):
    mailbox = found(tmp_path, rounds=8, max_staleness=1, codec="topk")
    coordinator, others = Coordinator(mailbox), clients(mailbox, tmp_path, "ab")
    slow = LightClient(mailbox, "s", tmp_path / "s", max_bytes=BUDGET)
    run_rounds(coordinator, [*others, slow], 1)
    assert coordinator.close_round().round == 2
    with monkeypatch.context() as patch:
        patch.setattr(FolderMailbox, "post_update", _away)
        with pytest.raises(MailboxError):
            slow.step()
    owed = slow.session.residual.clone()
    assert owed.any()
    slow.session.close()
    run_rounds(coordinator, others, 4)
    back = LightClient(mailbox, "s", tmp_path / "s", max_bytes=BUDGET)
    assert back.participation.next().round == 6
    assert torch.equal(back.session.residual, owed)
    assert mailbox.list_updates(2, ["s"]) == []


def _away(*arguments, **options):
    raise MailboxError("The mailbox is away.")


def test_everything_of_accepted_updates_reaches_the_adapter_or_the_residual(tmp_path):
    """Over a federation with late, stale and timely updates: sent plus kept is what was trained for those."""
    mailbox = found(tmp_path, rounds=9, max_staleness=1, min_clients=1, codec="topk", clip=None, error_feedback=1.0)
    coordinator = Coordinator(mailbox)
    client, other = clients(mailbox, tmp_path, "ab")
    deltas = {}
    original = client.session.finish

    def kept_too(round, base, delta, **options):
        deltas[round] = delta.double()
        return original(round, base, delta, **options)

    client.session.finish = kept_too
    for round, steps in enumerate(("ab", "b", "a", "b", "b", "ab", "a", "b", "ab")):
        for name in steps:
            (client if name == "a" else other).step()
        if round == 5:
            (tmp_path / "updates/000005/a.safetensors").unlink()  # lost on its way
        if coordinator.ready() and not coordinator.finished:
            coordinator.close_round()
    client.step()
    sent = torch.zeros(SCHEMA.num_params, dtype=torch.float64)
    accepted = [s.round for s in client.participation.settlements if s.outcome == "accepted"]
    for round in accepted:
        (ref,) = mailbox.list_updates(round, ["a"])
        _, payload = message.unpack(mailbox.read_update(ref, max_bytes=BUDGET))
        sent += get_codec("topk").decode(payload, SCHEMA).to_dense().double()
    assert [s.round for s in client.participation.settlements if s.outcome == "late"] == [5]
    assert torch.allclose(sent + client.session.residual.double(), sum(deltas[round] for round in accepted), atol=1e-4)
