"""Who takes part: enrolled clients, some of them drawn for each round, joining, leaving, returning, killed; pauses."""

import pytest
import torch
from light import LightClient, NothingToDo, fake_training, found, found_in, run_rounds
from light_updates import found_enrolled, ones, post

from fedfstq_hf.codec.budget import MessageBudget
from fedfstq_hf.errors import ConfigError, MailboxError
from fedfstq_hf.federation import control, keys
from fedfstq_hf.federation.client.participation import MailboxParticipation
from fedfstq_hf.federation.control import Control, Enrolment, change_control
from fedfstq_hf.federation.mailbox.folder import FolderMailbox
from fedfstq_hf.federation.record import RoundRecord
from fedfstq_hf.federation.server.coordinator import Coordinator
from fedfstq_hf.federation.spec import FederationSpec


def join(mailbox, path, names):
    return [LightClient(mailbox, name, path / name, max_bytes=None) for name in names]


# Enrolment


def test_a_client_that_is_not_enrolled_is_told_at_once(tmp_path):
    mailbox = found_enrolled(tmp_path, "ab")
    (stranger,) = join(mailbox, tmp_path, "z")
    with pytest.raises(MailboxError, match=r"Client 'z' is not enrolled in .* ask for `fedfstq enrol .* z`"):
        stranger.step()
    assert stranger.session.last_round == -1
    change_control(mailbox, control.enrol(["z"]))
    assert stranger.step()


def test_a_message_of_a_stranger_is_not_even_listed(tmp_path):
    mailbox = found_enrolled(tmp_path, "ab")
    for name in "abz":
        post(mailbox, name, ones(1))
    record = Coordinator(mailbox).close_round()
    assert [u.client_id for u in record.updates] == ["a", "b"]


def test_a_dismissed_client_s_waiting_update_is_not_used(tmp_path):
    mailbox = found_enrolled(tmp_path, "abc")
    coordinator = Coordinator(mailbox)
    clients = join(mailbox, tmp_path, "abc")
    for client in clients:
        client.step()
    change_control(mailbox, control.dismiss(["b"]))
    assert [u.client_id for u in coordinator.close_round().accepted] == ["a", "c"]
    with pytest.raises(MailboxError, match="'b' is not enrolled"):
        clients[1].step()
    change_control(mailbox, control.enrol(["b"]))
    assert clients[1].step()  # it returns, and trains again
    assert clients[1].participation.settlements[0].outcome == "late"


def test_what_was_refused_is_looked_at_again_when_enrolments_change(tmp_path):
    """A key that is enrolled while the message waits counts, as it would for a coordinator that is started anew."""
    pair = keys.new_keypair()
    mailbox = found_enrolled(tmp_path, "ab", signatures=True, rounds=3)
    change_control(mailbox, control.enrol(["b"], verify_key=keys.new_keypair().verify_key))
    sign = keys.signer(pair, FederationSpec.from_json(mailbox.read(0, "spec.json")).id)
    for name in "ab":
        post(mailbox, name, ones(1), sign=sign)
    coordinator = Coordinator(mailbox)
    assert coordinator.close_round() is None
    assert not coordinator.ready()
    change_control(mailbox, control.pause("a pause changes nothing of it"))
    change_control(mailbox, control.resume)
    assert not coordinator.ready()
    change_control(mailbox, control.enrol(["a", "b"], verify_key=pair.verify_key))
    assert coordinator.ready()
    record = coordinator.close_round()
    assert [(u.client_id, u.signed) for u in record.accepted] == [("a", True), ("b", True)]
    assert record.refused == ()


def test_a_founding_that_could_never_close_a_round_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"2 clients are enrolled, but 3 updates close a round"):
        found_enrolled(tmp_path, "ab", min_clients=3)
    with pytest.raises(ConfigError, match=r"clients_per_round = 2 asks for clients to draw from.* Type --clients"):
        found(tmp_path, clients_per_round=2)
    with pytest.raises(ConfigError, match=r"clients_per_round is 2, but min_clients = 3 updates close a round"):
        found_enrolled(tmp_path, "abcd", clients_per_round=2, min_clients=3)
    assert list(tmp_path.iterdir()) == []


def test_what_an_interrupted_founding_left_is_replaced(tmp_path):
    mailbox = FolderMailbox(tmp_path, durable=False)
    assert mailbox.write_control(Control(clients={"a": Enrolment()}).to_json(), expected=None)
    found(tmp_path)
    assert control.read_control(mailbox) == Control()


# Some of them in each round


def sampled(path, **changes):
    settings = {"clients_per_round": 2, "min_clients": 2, "rounds": 6} | changes
    return found_enrolled(path, "abcde", **settings)


def test_only_those_who_were_drawn_train(tmp_path):
    mailbox = sampled(tmp_path)
    coordinator = Coordinator(mailbox)
    clients = join(mailbox, tmp_path, "abcde")
    for _ in range(6):
        chosen = coordinator.record.selected
        assert len(chosen) == 2
        worked = [client.session.client_id for client in clients if client.step()]
        assert worked == list(chosen)
        coordinator.close_round()
        assert [u.client_id for u in coordinator.record.accepted] == list(chosen)
    assert coordinator.record.selected is None  # after the end nobody is asked
    assert all(client.step() and client.done for client in clients)


def test_who_is_drawn_depends_on_the_seed_alone(tmp_path):
    drawn = []
    for place, seed in (("one", 5), ("two", 5), ("three", 6)):
        mailbox = sampled(tmp_path / place, seed=seed)
        coordinator = Coordinator(mailbox)
        run = []
        for round in range(6):
            run.append(coordinator.record.selected)
            for name in coordinator.record.selected:
                post(mailbox, name, ones(1), round=round)
            Coordinator(mailbox).close_round()  # another process each round
            coordinator = Coordinator(mailbox)
        drawn.append(run)
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) > 1


def test_an_update_of_a_client_that_was_not_drawn_is_refused(tmp_path):
    mailbox = sampled(tmp_path)
    coordinator = Coordinator(mailbox)
    for name in "abcde":
        post(mailbox, name, ones(1))
    chosen = coordinator.record.selected
    record = coordinator.close_round()
    assert tuple(u.client_id for u in record.accepted) == chosen
    assert {u.client_id for u in record.refused} == set("abcde") - set(chosen)
    assert {u.reason.split(" was ")[1] for u in record.refused} == {"not selected for this round."}


def test_a_client_that_is_not_drawn_does_not_give_up_while_rounds_go_on(tmp_path, monkeypatch):
    """wait_seconds is for a federation that stands still."""
    members = Control(clients={"a": Enrolment(), "b": Enrolment()})
    seed = next(seed for seed in range(99) if all(members.select(r, seed, 1) == ("a",) for r in range(4)))
    mailbox = found_enrolled(tmp_path, "ab", clients_per_round=1, min_clients=1, rounds=99, seed=seed)
    coordinator, now = Coordinator(mailbox), [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    def sleep(seconds):
        now[0] += 10
        if coordinator.record.round < 3:
            post(mailbox, "a", ones(1), round=coordinator.record.round)
            coordinator.close_round()

    idle = LightClient(mailbox, "b", None).session
    waiting = MailboxParticipation(mailbox, idle, budget=MessageBudget(), wait_seconds=15, sleep=sleep)
    with pytest.raises(MailboxError, match=r"No new round in .* for 15 s after round 3"):
        waiting.next()
    assert now[0] == 50  # three rounds of ten seconds each, and then two more looks


# Pauses


def test_no_round_is_closed_while_the_federation_is_paused(tmp_path):
    mailbox = found(tmp_path)
    coordinator = Coordinator(mailbox)
    clients = join(mailbox, tmp_path, "ab")
    change_control(mailbox, control.pause("the cluster moves"))
    for client in clients:
        assert client.step()  # what a client has begun it may send
    assert coordinator.paused == "the cluster moves"
    assert not coordinator.ready()
    assert coordinator.serve(once=True).round == 0
    change_control(mailbox, control.resume)
    assert coordinator.ready()
    assert coordinator.serve(once=True).round == 1


def test_a_pause_holds_against_a_deadline(tmp_path):
    mailbox = found(tmp_path, min_clients=3, round_seconds=60.0)
    coordinator = Coordinator(mailbox, clock=lambda: 1e9)
    post(mailbox, "a", ones(1))
    change_control(mailbox, control.pause("wait"))
    assert not coordinator.ready()
    change_control(mailbox, control.resume)
    assert coordinator.ready()


def test_coordinator_and_clients_say_that_and_why_it_is_paused(tmp_path, caplog):
    mailbox = found(tmp_path)
    coordinator = Coordinator(mailbox)
    one, two = join(mailbox, tmp_path, "ab")
    one.step()
    two.step()
    change_control(mailbox, control.pause("the cluster moves"))
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        if len(slept) == 3:
            change_control(mailbox, control.resume)
        if len(slept) > 4:
            raise NothingToDo

    with caplog.at_level("INFO"), pytest.raises(NothingToDo):
        coordinator.serve(sleep=sleep)
    assert caplog.text.count("Paused: the cluster moves") == 1
    change_control(mailbox, control.pause("again"))
    one.step()
    with caplog.at_level("INFO"):
        assert not one.step()
    assert "paused: again" in caplog.text


# Coming and going


def test_a_federation_survives_members_that_join_leave_and_return(tmp_path):
    mailbox = found(tmp_path, rounds=6, codec="topk", min_clients=2)
    coordinator = Coordinator(mailbox)
    everybody = dict.fromkeys("abcd")
    for present in ("ab", "abc", "bc", "cd", "abcd", "ad"):
        for name in present:
            if everybody[name] is None:
                everybody[name] = LightClient(mailbox, name, tmp_path / name, max_bytes=400)
            everybody[name].step()
        for name in set("abcd") - set(present):
            if everybody[name] is not None:  # it goes away, as a process does
                everybody[name].session.close()
                everybody[name] = None
        coordinator.close_round()
    accepted = [
        "".join(u.client_id for u in RoundRecord.from_json(mailbox.read(round, "round.json")).accepted)
        for round in range(1, 7)
    ]
    assert accepted == ["ab", "abc", "bc", "cd", "abcd", "ad"]
    assert coordinator.finished


@pytest.mark.parametrize("killed_after", ["next", "finish", "post", "settle"])
def test_a_client_killed_between_any_two_steps_changes_nothing(tmp_path, killed_after):
    def run(path, dies):
        mailbox = found(path, rounds=3, codec="topk")
        coordinator = Coordinator(mailbox)
        one, two = (LightClient(mailbox, name, path / name, max_bytes=400) for name in "ab")
        for _ in range(3):
            two.step()
            if dies:
                one = _restarted(one, mailbox, path / "a", killed_after)
            one.step()
            coordinator.close_round()
        one.step()
        assert one.done
        residual = one.session.residual
        return coordinator.record.adapter_sha256, None if residual is None else residual.tolist()

    assert run(tmp_path / "alive", False) == run(tmp_path / "killed", True)


def _restarted(client, mailbox, folder, killed_after):
    assignment = client.participation.next()
    if killed_after in ("finish", "post"):
        result = fake_training(assignment.adapter, assignment.seed, client.session.carried)
        if killed_after == "finish":
            client.participation.uplink.send = lambda newest: None
        client.participation.complete(assignment, result)
    client.session.close()
    again = LightClient(mailbox, "a", folder, max_bytes=400)
    if killed_after == "settle":
        again.participation._settled(again.participation._newest_record())
        again.session.close()
        again = LightClient(mailbox, "a", folder, max_bytes=400)
    return again


# Clocks


@pytest.mark.parametrize("skew", [-3600.0, 3600.0])
def test_a_client_whose_clock_is_an_hour_off_takes_part_like_any_other(tmp_path, monkeypatch, skew):
    """Deadlines are the coordinator's; of a client's clock only durations count."""
    now = [1_000_000.0]

    def run(path, client_skew):
        now[0] = 1_000_000.0
        monkeypatch.setattr("time.time", lambda: now[0] + client_skew)
        mailbox = FolderMailbox(path, durable=False)
        found_in(mailbox, now=now[0], rounds=3, round_seconds=60.0, salt="0" * 32)
        coordinator = Coordinator(mailbox, clock=lambda: now[0])
        patiences = []
        post_update = mailbox.post_update
        mailbox.post_update = lambda *args, patience=None: (patiences.append(patience), post_update(*args))[1]
        clients = join(mailbox, path, "ab")
        for _ in range(3):
            now[0] += 10
            run_rounds(coordinator, clients, 1)
        assert all(s.outcome == "accepted" for client in clients for s in client.participation.settlements)
        return coordinator.record, patiences

    record, patiences = run(tmp_path / "skewed", skew)
    assert (record, patiences) == run(tmp_path / "exact", 0.0)
    assert set(patiences) == {60.0}


def test_the_coordinator_s_clock_alone_closes_a_round(tmp_path):
    now = [0.0]
    mailbox = found(tmp_path, min_clients=2, round_seconds=60.0)
    coordinator = Coordinator(mailbox, clock=lambda: now[0])
    post(mailbox, "a", ones(1))
    now[0] = 59.9
    assert not coordinator.ready()
    now[0] = 60.0
    assert coordinator.ready()
    assert torch.isfinite(coordinator.adapter).all()


def test_past_the_deadline_the_others_are_asked(tmp_path, monkeypatch):
    """The one that was drawn is offline: without this the round would never close."""
    now = [0.0]
    monkeypatch.setattr("fedfstq_hf.federation.client.participation.time.monotonic", lambda: now[0])
    mailbox = FolderMailbox(tmp_path / "box", durable=False)
    enrolled = Control(clients={name: Enrolment() for name in "abcd"})
    found_in(mailbox, control=enrolled, min_clients=1, clients_per_round=1, round_seconds=10.0, rounds=4)
    coordinator = Coordinator(mailbox, clock=lambda: now[0])
    (drawn,) = coordinator.record.selected
    others = join(mailbox, tmp_path, sorted(set("abcd") - {drawn}))
    assert not any(client.step() for client in others)
    now[0] = 9.0
    assert not any(client.step() for client in others)
    now[0] = 10.0
    assert others[0].step()
    record = coordinator.close_round()
    assert [update.client_id for update in record.accepted] == [others[0].session.client_id]
    assert record.round == 1
