"""A client's second messages: stored with the first, posted behind it, and never waited for longer than they need."""

import dataclasses
import json
import threading

import pytest
import torch
from light import SCHEMA, LightClient, found, make_spec, pause, run_rounds
from light_refining import PREVIEW, REFINED, REFINEMENT, RefiningClient, clients
from light_sessions import finish, make_session, record
from safetensors.torch import load, save

from fedfstq_hf.codec import get_codec, message
from fedfstq_hf.codec.budget import MessageBudget, open_budget
from fedfstq_hf.errors import BudgetError, MailboxError, MailboxUnavailableError
from fedfstq_hf.federation.client.participation import MailboxParticipation
from fedfstq_hf.federation.client.session import Caps, ClientSession, says_nothing_yet
from fedfstq_hf.federation.client.uplink import BackgroundUpload
from fedfstq_hf.federation.mailbox.folder import FolderMailbox
from fedfstq_hf.federation.record import RoundRecord
from fedfstq_hf.federation.server.coordinator import Coordinator

SPEC = make_spec(rounds=3, **REFINED)
PATIENCE = 20  # seconds until a test that hangs fails


def refinements(mailbox, round):
    """client -> bytes."""
    refs = mailbox.list_updates(round, refinements=True)
    return {ref.client_id: mailbox.read_update(ref, max_bytes=9999) for ref in refs}


def both(session, round=0, preview=PREVIEW, refinement=REFINEMENT):
    """Finish a round with a message of each budget."""
    delta = torch.linspace(-1, 2, SCHEMA.num_params)
    return session.finish(
        round, "ab" * 32, delta, fisher=None, num_examples=5, max_bytes=preview, refinement_bytes=refinement
    )


def sent(data):
    """(header, how many coordinates a message sends)."""
    header, payload = message.unpack(data)
    return header, int(get_codec("topk").decode(payload, SCHEMA).to_dense().count_nonzero())


# The session


def test_both_messages_are_of_the_whole_update_each_within_its_budget():
    pending = both(make_session(spec=SPEC))
    (first, few), (second, more) = sent(pending.message), sent(pending.refinement)
    assert (first.params, second.params) == ({}, {"refinement": True})
    assert (first.round, first.base, first.num_examples) == (second.round, second.base, second.num_examples)
    assert PREVIEW - 12 < len(pending.message) <= PREVIEW < REFINEMENT - 12 < len(pending.refinement) <= REFINEMENT
    assert 0 < few < more < SCHEMA.num_params


def test_the_last_round_has_one_message_as_long_as_a_refinement():
    pending = both(make_session(spec=SPEC), round=2)
    assert pending.refinement is None
    assert message.unpack(pending.message)[0].params == {}
    assert REFINEMENT - 12 < len(pending.message) <= REFINEMENT


def test_a_federation_without_refinements_has_one_message_of_the_first_budget():
    pending = both(make_session(spec=make_spec(codec="topk")))
    assert pending.refinement is None
    assert len(pending.message) <= PREVIEW


def test_each_message_has_a_cap_of_its_own_and_that_of_the_last_round_is_the_refinement_s():
    def sizes(round):
        session = ClientSession("a", SPEC, SCHEMA, caps=Caps(350, 450))
        pending = both(session, round, 4096, 4096)
        return [len(data) for data in (pending.message, pending.refinement) if data is not None]

    (first, second), (last,) = sizes(0), sizes(2)
    assert 338 < first <= 350 < 438 < second <= 450
    assert 438 < last <= 450


def test_where_a_cap_holds_no_header_the_preview_says_nothing_yet():
    session = ClientSession("a", SPEC, SCHEMA, caps=Caps(1, None))
    pending = both(session, 0)
    assert message.unpack(pending.message)[1] == b""
    assert says_nothing_yet(pending)
    assert sent(pending.refinement)[1] > 0
    assert not says_nothing_yet(both(ClientSession("a", SPEC, SCHEMA), 0))
    plain = dataclasses.replace(pending, refinement=None)  # nothing follows: this is all that the client says
    assert message.unpack(plain.readable)[1] == b""
    assert not says_nothing_yet(plain)
    assert not says_nothing_yet(both(ClientSession("a", SPEC, SCHEMA, caps=Caps(None, 1)), 2))  # it is all there is


def test_both_messages_survive_a_restart(tmp_path):
    session = make_session(tmp_path, spec=SPEC)
    pending = both(session)
    session.close()
    again = make_session(tmp_path, spec=SPEC)
    assert (again.pending.message, again.pending.refinement) == (pending.message, pending.refinement)
    again.settle(record(1, accepted=[pending]))
    assert again.residual is None
    again.close()
    assert make_session(tmp_path, spec=SPEC).pending is None


def test_a_state_from_before_there_were_refinements_is_read(tmp_path):
    session = make_session(tmp_path, spec=SPEC)
    pending = both(session)
    session.close()
    path = tmp_path / "session.safetensors"
    data = path.read_bytes()
    fields = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    tensors = load(data)
    del tensors["pending.refinement"]
    path.write_bytes(save(tensors, metadata=fields))
    again = make_session(tmp_path, spec=SPEC)
    assert (again.pending.message, again.pending.refinement) == (pending.message, None)


def test_without_refinements_a_state_is_stored_as_before(tmp_path):
    finish(make_session(tmp_path))
    assert set(load((tmp_path / "session.safetensors").read_bytes())) == {
        "pending.round",
        "pending.message",
        "pending.corrected",
    }


def test_budgets_are_checked_with_the_longer_header_of_refinements():
    def least(spec):
        session = make_session(spec=spec)
        return next(size for size in range(250, 450) if fits(session, size))

    plain, refining = least(make_spec(codec="topk", rounds=3)), least(SPEC)
    assert refining - plain == len(r"\"refinement\":true")


def fits(session, size):
    try:
        session.check_budget(size)
    except BudgetError:
        return False
    return True


def test_a_refinement_budget_that_holds_no_message_is_refused_before_training(tmp_path):
    mailbox = found(tmp_path, **REFINED)
    with pytest.raises(BudgetError, match=r"^refinement_budget: An uplink budget of 200 bytes"):
        RefiningClient(mailbox, "a", None, preview=4096, refinement=200)


def test_of_a_shared_and_an_own_budget_the_one_that_is_too_small_is_named(tmp_path):
    mailbox = found(tmp_path, **(REFINED | {"min_clients": 4}))
    session = make_session(spec=make_spec(min_clients=4, **REFINED))
    own, shared = MessageBudget(fixed=4096), MessageBudget(fixed=800, shared=True)
    with pytest.raises(BudgetError, match=r"^refinement_budget: .*4 messages.*own refinement_budget without `round:`"):
        MailboxParticipation(mailbox, session, budget=own, refinements=shared, sleep=pause)
    with pytest.raises(BudgetError, match=r"^uplink_budget: .*4 messages.*own uplink_budget without `round:`"):
        MailboxParticipation(mailbox, session, budget=shared, refinements=own, sleep=pause)
    with pytest.raises(BudgetError, match=r"^uplink_budget: (?!.*messages)"):
        MailboxParticipation(mailbox, session, budget=MessageBudget(fixed=100), refinements=shared, sleep=pause)


def test_a_refinement_budget_that_a_round_shares_is_divided_by_its_messages(tmp_path):
    mailbox = found(tmp_path, **(REFINED | {"min_clients": 2}))
    client = RefiningClient(mailbox, "a", None)
    client.participation = MailboxParticipation(
        mailbox,
        client.session,
        budget=MessageBudget(fixed=PREVIEW),
        refinements=open_budget("round:900B", SCHEMA.num_params),
        sleep=pause,
    )
    assert client.step()
    client.participation.uplink.background.wait()
    assert 438 < len(client.session.pending.refinement) <= 450


# Sending it


def test_it_is_posted_after_the_message_and_both_are_logged(tmp_path):
    mailbox = found(tmp_path, rounds=3, **REFINED)
    client = RefiningClient(mailbox, "a", None)
    order, post = [], mailbox.post_update
    mailbox.post_update = lambda *a, refinement=False, **o: (order.append(refinement), post(*a, refinement=refinement))
    logged = []
    complete = client.participation.complete
    client.participation.complete = lambda *arguments: logged.append(complete(*arguments))
    assert client.step()
    pending = client.session.pending
    assert order == [False, True]
    assert refinements(mailbox, 0) == {"a": pending.refinement}
    assert logged[0]["fed_uplink_bytes"] == len(pending.message) + len(pending.refinement)
    assert not client.step()  # looked again: nothing is sent twice
    assert order == [False, True]


class Slow(FolderMailbox):
    """Refinements are not taken before the test says so."""

    def __init__(self, path):
        super().__init__(path, durable=False)
        self.open, self.asked = threading.Event(), threading.Event()

    def post_update(self, *arguments, refinement=False, **options):
        if refinement:
            self.asked.set()
            assert self.open.wait(PATIENCE)
        super().post_update(*arguments, refinement=refinement, **options)


def waiting(client):
    """An event that is set when the client begins to wait for its refinement."""
    waits, following = threading.Event(), client.participation.uplink.background
    wait = following.wait
    following.wait = lambda: (waits.set(), wait())
    return waits


def test_the_client_goes_on_while_it_is_sent_and_the_next_message_waits_for_it(tmp_path):
    mailbox = found(tmp_path / "box", rounds=3, **(REFINED | {"min_clients": 1}))
    slow = Slow(mailbox.path)
    client = RefiningClient(slow, "a", None)
    assert LightClient.step(client)  # it does not wait
    assert slow.asked.wait(PATIENCE)
    assert refinements(mailbox, 0) == {}
    assert Coordinator(mailbox).close_round().round == 1
    waits = waiting(client)
    training = threading.Thread(target=LightClient.step, args=(client,))
    training.start()
    assert waits.wait(PATIENCE)
    assert client.session.last_round == 1  # it has trained,
    assert mailbox.list_updates(1) == []  # and waits for its uplink
    slow.open.set()
    training.join(PATIENCE)
    assert list(refinements(mailbox, 0)) == ["a"]
    assert [ref.client_id for ref in mailbox.list_updates(1)] == ["a"]


def test_at_the_end_of_the_federation_the_client_waits_until_it_is_sent(tmp_path):
    mailbox = found(tmp_path / "box", rounds=3, **(REFINED | {"min_clients": 1}))
    slow = Slow(mailbox.path)
    client = RefiningClient(slow, "a", None)
    assert LightClient.step(client)
    Coordinator(mailbox).stop()
    ended, waits = [], waiting(client)
    ending = threading.Thread(target=lambda: ended.append(client.participation.next()))
    ending.start()
    assert waits.wait(PATIENCE)
    assert ended == []
    slow.open.set()
    ending.join(PATIENCE)
    assert ended == [None]
    assert list(refinements(mailbox, 0)) == ["a"]


def test_one_that_cannot_be_sent_only_costs_a_warning(tmp_path, caplog):
    mailbox = found(tmp_path, rounds=3, **REFINED)
    members = clients(mailbox, tmp_path, "ab")
    post = mailbox.post_update

    def away(*arguments, refinement=False, **options):
        if refinement:
            raise MailboxUnavailableError("The mailbox is away.")
        post(*arguments, **options)

    mailbox.post_update = away
    coordinator = Coordinator(mailbox)
    run_rounds(coordinator, members)
    assert all(client.done for client in members)
    assert [s.outcome for s in members[0].participation.settlements] == ["accepted"] * 3
    assert (refinements(mailbox, 0), coordinator.record.refinements) == ({}, ())
    warnings = [entry.getMessage() for entry in caplog.records if entry.name == "fedfstq_hf.federation.client.uplink"]
    assert warnings == [
        f"The refinement of round {round} could not be sent: The mailbox is away." for round in (0, 0, 1, 1)
    ]


def test_it_is_begun_once_and_never_for_an_earlier_round(tmp_path):
    mailbox = found(tmp_path)
    following = BackgroundUpload(mailbox, "a")
    for round, data in ((1, b"one"), (1, b"again"), (0, b"zero"), (2, b"two")):
        following.start(round, data)
    following.wait()
    following.wait()
    assert [refinements(mailbox, round) for round in range(3)] == [{}, {"a": b"one"}, {"a": b"two"}]


class Killed(BaseException):
    """Ends a client between two of its writes."""


def killed_before_the_refinement(mailbox, path, monkeypatch):
    """The session's folder of a client that posted its preview and no more; returns what it had stored."""
    client = RefiningClient(mailbox, "a", path)
    with monkeypatch.context() as patch:
        patch.setattr(BackgroundUpload, "start", lambda *arguments: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            LightClient.step(client)
    assert [ref.client_id for ref in mailbox.list_updates(0, ["a"])] == ["a"]
    assert refinements(mailbox, 0).get("a") is None
    client.session.close()
    return client.session.pending


@pytest.mark.parametrize("closed", [False, True], ids=["round open", "round closed"])
def test_a_client_restarted_before_its_refinement_was_posted_posts_it(tmp_path, monkeypatch, closed):
    mailbox = found(tmp_path, rounds=4, **REFINED)
    stored = killed_before_the_refinement(mailbox, tmp_path / "a", monkeypatch)
    if closed:
        assert RefiningClient(mailbox, "b", None).step()
        assert Coordinator(mailbox).close_round() is not None
    again = RefiningClient(mailbox, "a", tmp_path / "a")
    assert again.step() is closed  # goes on with round 1 where that is open
    assert refinements(mailbox, 0)["a"] == stored.refinement
    (ref,) = mailbox.list_updates(0, ["a"])
    assert mailbox.read_update(ref, max_bytes=9999) == stored.message


def test_a_refinement_that_can_no_longer_be_used_is_not_posted(tmp_path, monkeypatch):
    mailbox = found(tmp_path, rounds=4, **REFINED)
    killed_before_the_refinement(mailbox, tmp_path / "a", monkeypatch)
    run_rounds(Coordinator(mailbox), clients(mailbox, tmp_path, "bc"), 2)
    again = RefiningClient(mailbox, "a", tmp_path / "a")
    assert again.participation.next().round == 2
    again.participation.uplink.background.wait()
    assert list(refinements(mailbox, 0)) == ["b", "c"]


def test_after_a_rollback_no_refinement_of_an_undone_round_is_posted(tmp_path, monkeypatch):
    mailbox = found(tmp_path, rounds=4, **REFINED)
    coordinator = Coordinator(mailbox)
    run_rounds(coordinator, clients(mailbox, tmp_path, "bc"), 1)
    client = RefiningClient(mailbox, "a", tmp_path / "a")
    with monkeypatch.context() as patch:
        patch.setattr(BackgroundUpload, "start", lambda *arguments: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            LightClient.step(client)
    client.session.close()
    coordinator.rollback(0)
    again = RefiningClient(mailbox, "a", tmp_path / "a")
    assert again.participation.next().round == 2
    again.participation.uplink.background.wait()
    assert [s.outcome for s in again.participation.settlements] == ["refused"]
    assert refinements(mailbox, 1).keys() == {"b", "c"}


def test_a_preview_that_came_too_late_is_followed_by_its_refinement(tmp_path):
    """As where the mailbox was away until the deadline had passed."""
    mailbox = found(tmp_path, rounds=4, round_seconds=60.0, **(REFINED | {"min_clients": 1}))
    coordinator = Coordinator(mailbox, clock=lambda: 1.0)
    slow, other = clients(mailbox, tmp_path, "ab")
    post = mailbox.post_update

    def away(*arguments, **options):
        raise MailboxUnavailableError("The mailbox is away.")

    mailbox.post_update = away
    assert slow.step()
    assert slow.session.pending.round == 0
    mailbox.post_update = post
    run_rounds(coordinator, [other], 1)
    assert slow.step()
    assert list(refinements(mailbox, 0)) == ["a", "b"]
    assert mailbox.list_updates(0, ["a"]) == []
    assert coordinator.close_round() is not None
    assert [entry.client_id for entry in coordinator.record.refinements] == ["a", "b"]


def test_a_record_says_nothing_of_what_there_is_not(tmp_path):
    mailbox = found(tmp_path)
    members = [LightClient(mailbox, name, None) for name in "ab"]
    run_rounds(Coordinator(mailbox), members, 1)
    given = json.loads(mailbox.read(1, "round.json"))
    assert not {"refinements", "refused", "late", "selected", "signature"} & given.keys()
    given["refused"] = [{"client_id": "c", "sha256": "", "num_bytes": 3, "reason": "why not"}]
    read = RoundRecord.from_json(json.dumps(given).encode())
    assert (len(read.accepted), read.refinements, read.refused[0].refinement) == (2, (), False)
    assert RoundRecord.from_json(read.to_json()) == read


def test_a_message_is_not_settled_by_what_became_of_its_refinement():
    session = make_session(spec=SPEC)
    pending = both(session)
    named = record(1, refused=[pending])
    (entry,) = named.refused
    entry = type(entry)(entry.client_id, "", 9999, "too large", 0, refinement=True)
    named = RoundRecord(**{**vars(named), "refused": (entry,)})
    assert named.fate("a", pending.sha256) is None
    assert session.settle(named).outcome == "late"


def test_an_error_of_another_kind_in_a_record_is_still_told():
    with pytest.raises(MailboxError, match="cannot be read"):
        RoundRecord.from_json(b'{"format": 4, "accepted": [], "refused": [], "late": [], "refinements": 3}')
