"""A client whose message is another one each time it is read, or each time the mailbox is looked at."""

import os
from collections import Counter

import pytest
import torch
from light import found
from light_updates import SIZE, delta, make_message, ones, post
from planting import KINDS

from fedfstq_hf.codec import get_codec
from fedfstq_hf.errors import MailboxError, MailboxUnavailableError, MessageError
from fedfstq_hf.federation.mailbox.protocol import UpdateRef
from fedfstq_hf.federation.server.collecting import Collector
from fedfstq_hf.federation.server.coordinator import Coordinator

pytestmark = pytest.mark.timeout(20)


def path_of(mailbox, client):
    return mailbox.path / f"updates/000000/{client}.safetensors"


def put(mailbox, client, data):
    """As a client may who does not keep to the protocol."""
    path = path_of(mailbox, client)
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def watch(mailbox, monkeypatch, after=lambda client, times: None):
    """Counts how often each client's message is read, and calls `after` each time."""
    read, original = Counter(), mailbox.read_update

    def counted(ref, *, max_bytes):
        read[ref.client_id] += 1
        try:
            return original(ref, max_bytes=max_bytes)
        finally:
            after(ref.client_id, read[ref.client_id])

    monkeypatch.setattr(mailbox, "read_update", counted)
    return read


def gone(mailbox, client):
    path_of(mailbox, client).unlink()


def grown(mailbox, client):
    with open(path_of(mailbox, client), "ab") as file:
        file.truncate(1 << 30)


def shrunk(mailbox, client):
    os.truncate(path_of(mailbox, client), 10)


def another(mailbox, client):
    put(mailbox, client, make_message(mailbox, client, ones(500)))


def replaced_by(kind):
    def change(mailbox, client):
        gone(mailbox, client)
        KINDS[kind](path_of(mailbox, client))

    return change


CHANGES = {
    "gone": gone,
    "grown": grown,
    "shrunk": shrunk,
    "another": another,
    "a pipe": replaced_by("pipe"),
    "a link": replaced_by("link to a device"),
    "a folder": replaced_by("folder"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_between_two_readings_only_the_client_that_did_it_loses(tmp_path, monkeypatch, change):
    """Norms 1, 1 and 60 are clipped at 10; without the 60 the mean is of two messages of norm 1."""
    mailbox = found(tmp_path, clip=10.0)
    for name, norm in (("a", 1), ("b", 1), ("x", 60)):
        post(mailbox, name, ones(norm))
    watch(mailbox, monkeypatch, lambda client, times: change(mailbox, "x") if (client, times) == ("x", 1) else None)
    coordinator = Coordinator(mailbox)
    before = coordinator.adapter.clone()
    record = coordinator.close_round()
    assert [(entry.client_id, entry.weight, entry.scale) for entry in record.accepted] == [("a", 0.5, 1), ("b", 0.5, 1)]
    assert [entry.client_id for entry in record.refused] == ["x"]
    assert "changed while it was being read" in record.refused[0].reason or "a second time" in record.refused[0].reason
    assert float((coordinator.adapter - before).norm()) == pytest.approx(1, abs=1e-4)


def test_each_client_that_does_it_costs_the_round_one_more_reading_at_most(tmp_path, monkeypatch):
    """The worst case: they change one after another, each in a reading of its own."""
    mailbox = found(tmp_path)
    hostile = [f"x{number}" for number in range(4)]
    for name in ("a", "b", *hostile):
        post(mailbox, name, ones(1))

    def change(client, times):
        if client in hostile and times == 1 + hostile.index(client):
            another(mailbox, client)

    read = watch(mailbox, monkeypatch, change)
    record = Coordinator(mailbox).close_round()
    assert [entry.client_id for entry in record.accepted] == ["a", "b"]
    assert [entry.client_id for entry in record.refused] == hostile
    assert read["a"] == 2 + len(hostile)


def test_changes_of_one_moment_are_found_in_one_reading(tmp_path, monkeypatch):
    mailbox = found(tmp_path)
    hostile = [f"x{number}" for number in range(4)]
    for name in ("a", "b", *hostile):
        post(mailbox, name, ones(1))
    read = watch(mailbox, monkeypatch, lambda client, times: another(mailbox, client) if client[0] == "x" else None)
    assert len(Coordinator(mailbox).close_round().refused) == 4
    assert read["a"] == 3


def test_where_too_few_are_left_the_round_waits_and_the_client_is_out_of_it(tmp_path, monkeypatch):
    mailbox = found(tmp_path)
    for name in "ax":
        post(mailbox, name, ones(1))
    read = watch(mailbox, monkeypatch, lambda client, times: another(mailbox, client) if client == "x" else None)
    coordinator = Coordinator(mailbox)
    assert coordinator.ready()
    assert coordinator.close_round() is None
    assert not coordinator.ready()
    post(mailbox, "b", ones(1))
    assert coordinator.ready()
    assert [entry.client_id for entry in coordinator.close_round().accepted] == ["a", "b"]
    assert read["x"] == 2


def test_a_client_that_posts_something_else_at_each_look_is_looked_at_three_times(tmp_path, monkeypatch, caplog):
    mailbox = found(tmp_path)
    post(mailbox, "a", ones(1))
    read, looks = watch(mailbox, monkeypatch), []
    coordinator = Coordinator(mailbox)
    for number in range(20):
        put(mailbox, "x", bytes(100 + number % 2))
        looks.append(coordinator.ready())
        if looks[-1]:
            assert coordinator.close_round() is None
    assert looks == [True] * 3 + [False] * 17
    assert read["x"] == 3
    assert caplog.text.count("No further message of client x for round 0 is looked at") == 1
    post(mailbox, "b", ones(1))
    record = coordinator.close_round()
    assert [entry.client_id for entry in record.accepted] == ["a", "b"]
    assert [entry.client_id for entry in record.refused] == ["x"]


def test_a_refused_message_is_read_once_however_often_one_looks(tmp_path, monkeypatch):
    mailbox = found(tmp_path)
    post(mailbox, "a", ones(1))
    put(mailbox, "x", b"no message")
    read, coordinator = watch(mailbox, monkeypatch), Coordinator(mailbox)
    for _ in range(10):
        if coordinator.ready():
            coordinator.close_round()
    assert read["x"] == 1


def test_a_better_message_of_the_same_size_takes_the_place_of_a_refused_one(tmp_path):
    mailbox = found(tmp_path)
    post(mailbox, "a", ones(1))
    good = make_message(mailbox, "x", ones(1))
    put(mailbox, "x", bytes(len(good)))
    coordinator = Coordinator(mailbox)
    assert coordinator.close_round() is None
    put(mailbox, "x", good)
    assert coordinator.ready()
    record = coordinator.close_round()
    assert ([entry.client_id for entry in record.accepted], record.refused) == (["a", "x"], ())


def test_a_message_that_goes_after_the_mailbox_was_listed_is_not_missed(tmp_path, monkeypatch):
    mailbox = found(tmp_path)
    for name in "abx":
        post(mailbox, name, ones(1))
    original = mailbox.list_updates

    def late(*arguments, **options):
        refs = original(*arguments, **options)
        path_of(mailbox, "x").unlink(missing_ok=True)
        return refs

    monkeypatch.setattr(mailbox, "list_updates", late)
    record = Coordinator(mailbox).close_round()
    assert [entry.client_id for entry in record.accepted] == ["a", "b"]


@pytest.mark.parametrize("kind", [None, "pipe", "folder", "dangling link"])
def test_a_late_message_that_cannot_be_read_is_named_as_it_is(tmp_path, kind, monkeypatch):
    mailbox = found(tmp_path, rounds=5)
    for name in "ab":
        post(mailbox, name, ones(1))
    coordinator = Coordinator(mailbox)
    coordinator.close_round()
    post(mailbox, "x", ones(1))
    original = mailbox.list_updates

    def late(round, *arguments, **options):
        refs = original(round, *arguments, **options)
        if round == 0 and path_of(mailbox, "x").exists():
            path_of(mailbox, "x").unlink()
            if kind is not None:
                KINDS[kind](path_of(mailbox, "x"))
        return refs

    monkeypatch.setattr(mailbox, "list_updates", late)
    for name in "ab":
        post(mailbox, name, ones(1), round=1)
    record = coordinator.close_round()
    assert [entry.client_id for entry in record.accepted] == ["a", "b"]
    assert [(entry.client_id, entry.sha256) for entry in record.late] == [("x", "")]


# What a mailbox or a codec does with it


def failing(error):
    def fail(ref, *, max_bytes):
        if ref.client_id == "x":
            raise error
        return fail.original(ref, max_bytes=max_bytes)

    return fail


@pytest.mark.parametrize("error", [MailboxError("its repo is gone"), MessageError("it is gone")])
def test_what_a_mailbox_says_of_one_message_concerns_that_one(tmp_path, monkeypatch, error):
    mailbox = found(tmp_path)
    for name in "abx":
        post(mailbox, name, ones(1))
    fail = failing(error)
    fail.original = mailbox.read_update
    monkeypatch.setattr(mailbox, "read_update", fail)
    record = Coordinator(mailbox).close_round()
    assert [entry.client_id for entry in record.accepted] == ["a", "b"]
    assert [(entry.client_id, entry.reason) for entry in record.refused] == [("x", str(error))]


def test_a_mailbox_that_cannot_be_reached_is_nobody_s_fault(tmp_path, monkeypatch):
    mailbox = found(tmp_path)
    for name in "abx":
        post(mailbox, name, ones(1))
    fail = failing(MailboxUnavailableError("the disk does not answer"))
    fail.original = mailbox.read_update
    monkeypatch.setattr(mailbox, "read_update", fail)
    with pytest.raises(MailboxUnavailableError):
        Coordinator(mailbox).close_round()


@pytest.mark.parametrize("error", [RecursionError("deep"), ValueError("odd"), MemoryError(), ZeroDivisionError("0")])
def test_a_fault_of_ours_that_one_message_finds_refuses_that_message(tmp_path, monkeypatch, error, caplog):
    mailbox = found(tmp_path)
    for name, number in (("a", 1), ("b", 2), ("x", 3)):
        post(mailbox, name, delta(number))
    codec = type(get_codec("fp32"))
    original = codec.decode

    def decode(self, payload, schema, context=None):
        update = original(self, payload, schema, context)
        if torch.equal(update.to_dense(), delta(3)):
            raise error
        return update

    monkeypatch.setattr(codec, "decode", decode)
    record = Coordinator(mailbox).close_round()
    assert [entry.client_id for entry in record.accepted] == ["a", "b"]
    assert record.refused[0].reason == f"It could not be opened: {type(error).__name__}."
    assert "Traceback" in caplog.text


# Numbers that add up to more than there is room for


def test_examples_of_one_client_beyond_all_measure(tmp_path):
    mailbox = found(tmp_path)
    post(mailbox, "a", ones(1))
    post(mailbox, "x", ones(1), num_examples=2**53 - 1)
    record = Coordinator(mailbox).close_round()
    assert [entry.num_examples for entry in record.accepted] == [1, 2**53 - 1]


@pytest.mark.parametrize("optimizer", [{"optimizer": "SGD", "lr": 1.0}, {"optimizer": "Adam", "lr": 0.01}])
def test_an_update_that_would_make_the_adapter_infinite_is_refused(tmp_path, optimizer):
    mailbox = found(tmp_path, clip=None, server=optimizer)
    for name in "ab":
        post(mailbox, name, ones(1))
    post(mailbox, "x", torch.full((SIZE,), 3e38))
    post(mailbox, "y", torch.full((SIZE,), -3e38))
    record = Coordinator(mailbox).close_round()
    assert [entry.client_id for entry in record.accepted] == ["a", "b"]
    assert [entry.client_id for entry in record.refused] == ["x", "y"]
    assert "no update is longer" in record.refused[0].reason


def test_the_collector_tells_messages_apart_without_reading_them(tmp_path):
    mailbox = found(tmp_path)
    collector = Collector(mailbox, 0, num_params=SIZE, base=lambda round: "", selected=lambda round: None)
    one = UpdateRef("x", 0, 10, location="1")
    collector._refuse(one, "", "no reason")
    assert collector._is_refused(one)
    assert not collector._is_refused(UpdateRef("x", 0, 10, location="2"))
    assert not collector._is_refused(UpdateRef("x", 0, 10, location="1", refinement=True))
    assert not collector._is_refused(UpdateRef("y", 0, 10, location="1"))
