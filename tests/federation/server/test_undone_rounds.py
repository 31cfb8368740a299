"""After a rollback: what clients kept of the undone rounds does not come back, whoever was away meanwhile."""

import dataclasses

import pytest
import torch
from light import SCHEMA, LightClient, found, run_rounds
from light_sessions import DELTA, finish, make_session, record
from light_updates import found_enrolled

from fedfstq_hf.errors import MailboxError
from fedfstq_hf.federation.client.participation import LocalResult
from fedfstq_hf.federation.mailbox.folder import FolderMailbox
from fedfstq_hf.federation.server.coordinator import Coordinator

SIZE = SCHEMA.num_params


class Steps:
    """Clients that move the adapter by what they are told, over a codec that leaves something out."""

    def __init__(self, path, names="ab", max_bytes=600, **changes):
        self.max_bytes = max_bytes
        settings = {"rounds": 30, "min_clients": 2, "codec": "topk", "clip": None} | changes
        self.mailbox = found_enrolled(path / "box", names, **settings)
        self.folder = path
        self.coordinator = Coordinator(self.mailbox)
        self.start = self.coordinator.adapter.clone()
        self.clients = {name: self.client(name) for name in names}

    def client(self, name):
        return LightClient(self.mailbox, name, self.folder / name, max_bytes=self.max_bytes)

    def train(self, step, names="ab"):
        for name in names:
            participation = self.clients[name].participation
            assignment = participation.next()
            carried = {"moments": torch.full((2,), float(assignment.round))}
            participation.complete(assignment, LocalResult(assignment.adapter + step, None, 5, carried))

    def close(self):
        assert self.coordinator.close_round() is not None
        return self.moved()

    def moved(self):
        """How far the adapter is from the first one, at most."""
        return float((self.coordinator.adapter - self.start).abs().max())

    def restart(self, name):
        self.clients[name].session.close()
        self.clients[name] = self.client(name)
        return self.clients[name]


@pytest.mark.parametrize("codec", ["fp32", "topk", "fstq"])
def test_a_rollback_is_a_rollback(tmp_path, codec):
    federation = Steps(tmp_path, codec=codec, max_bytes=None if codec == "fp32" else 600)
    federation.train(0.1)
    good = federation.close()
    assert 0 < good < 0.2
    federation.train(100.0)
    assert federation.close() > 50
    federation.train(300.0)  # waits, trained from the diverged adapter
    federation.coordinator.rollback(1)
    assert federation.moved() == good
    federation.train(0.1)
    assert federation.close() < 0.35  # what round 0 left out may come, nothing of 100 or 300


def test_what_a_message_of_an_undone_round_left_out_is_dropped(tmp_path):
    federation = Steps(tmp_path)
    federation.train(0.1)
    federation.close()
    federation.train(100.0)
    federation.close()
    session = federation.clients["a"].session
    federation.coordinator.rollback(1)
    assignment = federation.clients["a"].participation.next()
    assert [s.outcome for s in federation.clients["a"].participation.settlements] == ["accepted", "accepted"]
    assert (assignment.round, session.residual, session.carried) == (3, None, {})
    state = federation.restart("a").session
    assert (state.residual, state.carried, state.last_round) == (None, {}, 1)


def test_what_was_left_out_before_the_restored_round_is_kept(tmp_path):
    """Client c had no part in the undone round."""
    federation = Steps(tmp_path, "abc")
    federation.train(0.1, "abc")
    federation.close()
    session = federation.clients["c"].session
    assert federation.clients["c"].participation.next().round == 1
    owed = session.residual.clone()
    assert owed.any()
    federation.train(100.0)
    federation.close()
    federation.coordinator.rollback(1)
    assert federation.clients["c"].participation.next().round == 3
    assert torch.equal(session.residual, owed)
    assert session.carried["moments"].tolist() == [0, 0]
    federation.train(0.1, "c")  # of the round that began with the rollback
    assert torch.equal(session.residual, owed)


@pytest.mark.parametrize("restarted", [False, True])
def test_a_client_that_was_away_finds_out(tmp_path, restarted):
    """The rollback is no more the newest round, and records of rounds follow in which it had no part."""
    federation = Steps(tmp_path, "abc")
    federation.train(0.1, "abc")
    federation.close()
    federation.train(100.0, "abc")  # c goes away after this message
    federation.close()
    federation.coordinator.rollback(1)
    for _ in range(2):
        federation.train(0.1)
        federation.close()
    assert federation.coordinator.record.round == 5
    client = federation.restart("c") if restarted else federation.clients["c"]
    assert client.session.pending.corrected.max() > 50
    assert client.participation.next().round == 5
    assert client.participation.settlements[-1].outcome == "accepted"
    assert (client.session.residual, client.session.carried) == (None, {})


@pytest.mark.parametrize("max_staleness", [0, 3])
def test_a_client_that_posted_nothing_and_was_away_drops_its_update(tmp_path, monkeypatch, max_staleness):
    federation = Steps(tmp_path, "abc", max_staleness=max_staleness)
    federation.train(0.1, "abc")
    federation.close()
    with monkeypatch.context() as patch:
        patch.setattr(FolderMailbox, "post_update", _away)
        with pytest.raises(MailboxError, match="away"):
            federation.train(100.0, "c")
    federation.train(100.0)
    federation.close()
    owed = federation.clients["c"].session.residual.clone()
    federation.coordinator.rollback(1)
    client = federation.restart("c")
    assert client.participation.next().round == 3
    (settlement,) = client.participation.settlements
    expected = "round 3 went back to round 1" if max_staleness else ""
    assert (settlement.round, settlement.outcome, settlement.reason) == (1, "late", expected)
    assert torch.equal(client.session.residual, owed)  # of round 0
    assert federation.mailbox.list_updates(1, ["c"]) == []


def _away(*arguments, **options):
    raise MailboxError("The mailbox is away.")


def test_a_rollback_while_a_client_trains(tmp_path):
    federation = Steps(tmp_path)
    federation.train(0.1)
    federation.close()
    federation.train(100.0)
    federation.close()
    participation = federation.clients["a"].participation
    assignment = participation.next()
    federation.coordinator.rollback(1)
    participation.complete(assignment, LocalResult(assignment.adapter + 300.0, None, 5, {"moments": torch.ones(2)}))
    assert participation.next().round == 3
    session = federation.clients["a"].session
    assert [s.outcome for s in participation.settlements] == ["accepted", "accepted", "late"]
    assert (session.residual, session.carried) == (None, {})


def test_what_comes_after_a_rollback_stays_also_over_a_restart(tmp_path):
    federation = Steps(tmp_path)
    federation.train(0.1)
    federation.close()
    federation.coordinator.rollback(0)
    federation.train(0.1)
    federation.close()
    federation.train(0.1)
    session = federation.clients["a"].session
    owed, carried = session.residual.clone(), session.carried
    assert owed.any()
    federation.close()
    again = federation.restart("a")
    assert torch.equal(again.session.residual, owed)
    assert again.participation.next().round == 4
    assert again.session.residual.any()
    assert torch.equal(again.session.carried["moments"], carried["moments"])


def test_a_rollback_that_a_killed_client_had_not_stored_is_seen_again(tmp_path, monkeypatch):
    """The state is one file: killed before it is written, the client drops the same things in its next life."""
    federation = Steps(tmp_path)
    federation.train(100.0)
    federation.close()
    federation.coordinator.rollback(0)
    client = federation.clients["a"]
    with monkeypatch.context() as patch:
        patch.setattr(type(client.session), "undo", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            client.participation.next()
    again = federation.restart("a")
    assert again.session.residual.max() > 50
    assert again.participation.next().round == 2
    assert (again.session.residual, again.session.carried) == (None, {})


def test_records_are_read_only_where_something_is_held(tmp_path):
    mailbox = found(tmp_path, rounds=9, codec="fp16")
    coordinator = Coordinator(mailbox)
    run_rounds(coordinator, [LightClient(mailbox, name, None) for name in "ab"], 5)
    new = LightClient(mailbox, "c", None)
    read, original = [], new.participation._record
    new.participation._record = lambda round: (read.append(round), original(round))[1]
    assert new.participation.next().round == 5
    assert set(read) == {5}


# The session alone


def restored(round, to):
    return dataclasses.replace(record(round), restored_from=to)


def settled(accepted_by, folder=None):
    """A session whose residual the record of that round made, from a message of the round before."""
    session = make_session(folder)
    pending = finish(session, accepted_by - 1, carried={"moments": torch.ones(2)})
    session.settle(record(accepted_by, accepted=[pending]))
    assert session.settled_round == accepted_by
    return session


@pytest.mark.parametrize(
    ("round", "to", "residual", "carried"),
    [
        (6, 5, True, True),
        (6, 4, True, True),  # of the message of round 3, which the record of round 4 names: all of that is restored
        (6, 3, False, False),
        (6, 0, False, False),
        (5, 3, False, False),
        (2, 1, True, True),
    ],
)
def test_what_is_dropped(tmp_path, round, to, residual, carried):
    session = settled(4, tmp_path)
    before = (tmp_path / "session.safetensors").read_bytes()
    changed = session.undo(restored(round, to))
    assert changed == (not residual)
    assert ((tmp_path / "session.safetensors").read_bytes() == before) == (not changed)
    assert (session.residual is not None, bool(session.carried)) == (residual, carried)
    session.close()
    again = make_session(tmp_path)
    assert (again.residual is not None, bool(again.carried), again.last_round) == (residual, carried, 3)


def test_a_stale_message_makes_a_residual_of_the_round_that_used_it():
    """Trained before the restored round, used after it: undone, though what is carried is not."""
    session = make_session()
    pending = finish(session, 1, carried={"moments": torch.ones(2)})
    session.settle(record(4, accepted=[pending]))
    assert session.undo(restored(5, 3))
    assert (session.residual, list(session.carried)) == (None, ["moments"])


def test_an_ordinary_round_undoes_nothing():
    session = settled(4)
    assert not session.undo(record(6))
    assert session.residual is not None


def test_from_which_round_on_a_client_looks_for_rollbacks():
    session = make_session()
    assert session.oldest_round is None
    pending = finish(session, 3)
    assert session.oldest_round is None
    session.settle(record(4, accepted=[pending]))
    assert session.oldest_round == 4
    finish(session, 5, delta=DELTA, carried={"moments": torch.ones(2)})
    session.settle(record(6))
    assert session.oldest_round == 4
    session.undo(restored(7, 2))
    assert session.oldest_round is None
