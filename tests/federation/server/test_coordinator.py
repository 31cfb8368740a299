"""The coordinator: the mean of what it accepts, in client-id order; all state in the mailbox; one of two gives way."""

import hashlib
import re
import shutil

import pytest
import torch
from light import SCHEMA, LightClient, adapter_sha256, found, found_in, initial_state, run_rounds
from light_updates import SIZE, delta, make_message, post

from fedfstq_hf.codec import get_codec, message
from fedfstq_hf.errors import ConfigError, MailboxError, NonFiniteError, RoundConflictError
from fedfstq_hf.federation import adapter_file
from fedfstq_hf.federation.mailbox.folder import FolderMailbox
from fedfstq_hf.federation.record import RoundRecord
from fedfstq_hf.federation.server.coordinator import Coordinator


def test_the_weighted_mean_is_added(tmp_path):
    mailbox = found(tmp_path)
    post(mailbox, "b", delta(2), num_examples=3)
    post(mailbox, "a", delta(1), num_examples=1)
    coordinator = Coordinator(mailbox)
    start = coordinator.adapter.clone()
    assert torch.equal(start, SCHEMA.flatten(initial_state()))
    record = coordinator.close_round()
    expected = start + ((delta(1).double() + 3 * delta(2).double()) / 4).float()
    assert torch.equal(coordinator.adapter, expected)
    published = SCHEMA.flatten(adapter_file.load(mailbox.read(1, "adapter_model.safetensors")))
    assert torch.equal(published, expected)
    assert [(u.client_id, u.num_examples, u.weight) for u in record.accepted] == [("a", 1, 0.25), ("b", 3, 0.75)]
    assert record.accepted[0].norm == pytest.approx(float(delta(1).norm()))
    assert record.refused == ()
    assert record.adapter_sha256 == adapter_sha256(tmp_path) == adapter_sha256(tmp_path / "rounds/000001")


def test_the_order_of_arrival_does_not_matter(tmp_path):
    """Sums of floats depend on their order: it must be that of client ids."""
    generator = torch.Generator().manual_seed(0)
    updates = {name: torch.randn(SIZE, generator=generator) * 10**k for k, name in enumerate("abcdefg")}
    digests = set()
    for number, names in enumerate(("abcdefg", "gfedcba", "dagfbce")):
        mailbox = found(tmp_path / str(number), min_clients=7)
        for name in names:
            post(mailbox, name, updates[name], num_examples=3)
        Coordinator(mailbox).close_round()
        digests.add(adapter_sha256(tmp_path / str(number)))
    assert len(digests) == 1


WRONG = {
    "base": ({"base": "0" * 64}, "It names base adapter 0{64}; expected [0-9a-f]{64}"),
    "schema": ({"schema": "0" * 64}, "It names schema 0{64}; expected"),
    "codec": ({"codec": "fp16"}, "It names codec fp16; expected fp32"),
    "client": ({"client_id": "somebody", "path_id": "bad"}, "It names client somebody; expected bad"),
    "no examples": ({"num_examples": 0}, "trained on 0 examples; expected at least 1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_message_is_refused_with_its_reason(tmp_path, name):
    mailbox = found(tmp_path)
    changes, reason = WRONG[name]
    post(mailbox, "a", delta(1))
    data = post(mailbox, **({"client_id": "bad", "update": delta(9)} | changes))
    coordinator = Coordinator(mailbox)
    assert coordinator.ready()
    assert coordinator.close_round() is None  # one good update is not enough
    assert mailbox.head() == 0
    post(mailbox, "c", delta(3))
    record = coordinator.close_round()
    assert [u.client_id for u in record.accepted] == ["a", "c"]
    (refused,) = record.refused
    assert (refused.client_id, refused.num_bytes) == ("bad", len(data))
    assert refused.sha256 == hashlib.sha256(data).hexdigest()
    assert re.search(reason, refused.reason), refused.reason
    assert RoundRecord.from_json(mailbox.read(1, "round.json")) == record
    assert record.uplink_bytes == sum(ref.num_bytes for ref in mailbox.list_updates(0))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "digest does not match"),
        (lambda data: data[:-4], "sizes disagree"),
        (lambda data: data + b"\0", "sizes disagree"),
        (lambda data: b"", "0 bytes"),
        (lambda data: b"\xff" * 100, "header of"),
        (lambda data: bytes(5000), "It has 5000 bytes; this federation takes at most 4096"),
    ],
    ids=["flipped", "cut", "longer", "empty", "noise", "oversized"],
)
def test_a_damaged_message_is_refused(tmp_path, spoil, reason):
    mailbox = found(tmp_path)
    mailbox.post_update(0, "bad", spoil(make_message(mailbox, "bad", delta(1))))
    post(mailbox, "a", delta(1))
    post(mailbox, "c", delta(3))
    record = Coordinator(mailbox).close_round()
    assert [u.client_id for u in record.accepted] == ["a", "c"]
    assert reason in record.refused[0].reason


def test_an_oversized_message_is_not_even_read(tmp_path, monkeypatch):
    mailbox = found(tmp_path)
    mailbox.post_update(0, "bad", bytes(5000))
    post(mailbox, "a", delta(1))
    post(mailbox, "c", delta(3))
    read, original = [], mailbox.read_update
    monkeypatch.setattr(
        mailbox, "read_update", lambda ref, **limit: (read.append(ref.client_id), original(ref, **limit))[1]
    )
    Coordinator(mailbox).close_round()
    assert "bad" not in read
    assert set(read) == {"a", "c"}


def test_a_message_of_an_older_round_is_refused(tmp_path):
    mailbox = found(tmp_path)
    post(mailbox, "a", delta(1))
    post(mailbox, "b", delta(1))
    coordinator = Coordinator(mailbox)
    coordinator.close_round()
    base = coordinator.record.adapter_digest
    payload = get_codec("fp32").encode(SCHEMA.unflatten(delta(1))).payload
    replayed = message.pack(message.Header(0, "a", 1, base, SCHEMA.fingerprint, "fp32"), payload)
    mailbox.post_update(1, "a", replayed)
    post(mailbox, "b", delta(1), round=1)
    post(mailbox, "c", delta(1), round=1)
    (refused,) = coordinator.close_round().refused
    assert refused.reason == "It names round 0; expected 1."


def test_a_refused_message_is_read_once_while_the_round_waits(tmp_path, monkeypatch, caplog):
    mailbox = found(tmp_path)
    mailbox.post_update(0, "bad", b"garbage")
    post(mailbox, "a", delta(1))
    coordinator = Coordinator(mailbox)
    assert coordinator.ready()
    assert coordinator.close_round() is None
    assert not coordinator.ready()
    assert coordinator.close_round() is None
    assert caplog.text.count("Refused the update of client bad") == 1
    post(mailbox, "c", delta(1))
    assert [u.client_id for u in coordinator.close_round().refused] == ["bad"]


def test_it_waits_for_min_clients(tmp_path):
    mailbox = found(tmp_path, min_clients=3)
    coordinator = Coordinator(mailbox)
    for name in "ab":
        assert not coordinator.ready()
        assert coordinator.close_round() is None
        post(mailbox, name, delta(1))
    assert not coordinator.ready()
    post(mailbox, "c", delta(1))
    assert coordinator.ready()
    assert coordinator.close_round().round == 1


def test_a_deadline_closes_with_fewer_but_never_with_none(tmp_path):
    now = [100.0]
    mailbox = FolderMailbox(tmp_path, durable=False)
    found_in(mailbox, now=now[0], min_clients=3, round_seconds=60.0)
    coordinator = Coordinator(mailbox, clock=lambda: now[0])
    assert coordinator.record.deadline == 160.0
    now[0] = 161.0
    assert not coordinator.ready()
    assert coordinator.close_round() is None
    post(mailbox, "a", delta(1))
    now[0] = 159.0
    assert not coordinator.ready()
    now[0] = 160.0
    assert coordinator.ready()
    record = coordinator.close_round()
    assert (record.opened_at, record.deadline) == (160.0, 220.0)
    post(mailbox, "a", delta(1), round=1)
    now[0] = 221.0
    assert coordinator.close_round().deadline is None  # nothing is waited for after the last round


def test_the_last_round_is_the_end(tmp_path):
    mailbox = found(tmp_path)
    coordinator = Coordinator(mailbox)
    run_rounds(coordinator, [LightClient(mailbox, name, tmp_path / name) for name in "ab"])
    assert coordinator.finished
    assert (coordinator.record.round, coordinator.record.finished) == (2, True)
    slept = []
    assert coordinator.serve(sleep=slept.append).round == 2
    assert slept == []


def test_serve_polls_until_the_end(tmp_path):
    mailbox = found(tmp_path)
    coordinator = Coordinator(mailbox)
    clients = [LightClient(mailbox, name, tmp_path / name) for name in "ab"]
    rounds = []

    def sleep(seconds):
        assert 0.2 <= seconds <= 0.3  # nothing has to be waited for long: each wait is the first one
        for client in clients:
            client.step()

    last = coordinator.serve(poll_seconds=0.25, sleep=sleep, on_round=lambda record: rounds.append(record.round))
    assert rounds == [1, 2]
    assert last.finished


def test_serve_once_closes_what_is_ready_and_returns(tmp_path):
    mailbox = found(tmp_path)
    coordinator = Coordinator(mailbox)
    assert coordinator.serve(once=True).round == 0
    post(mailbox, "a", delta(1))
    post(mailbox, "b", delta(1))
    assert coordinator.serve(once=True).round == 1


SERVERS = [
    {"optimizer": "SGD", "lr": 1.0},
    {"optimizer": "SGD", "lr": 0.5, "momentum": 0.9},
    {"optimizer": "Adam", "lr": 0.1},
]


@pytest.mark.parametrize("server", SERVERS, ids=["sgd", "momentum", "adam"])
def test_the_server_optimizer_is_one_continuous_run(tmp_path, server):
    mailbox = found(tmp_path, server=server, rounds=5, min_clients=1)
    options = dict(server)
    parameter = torch.nn.Parameter(SCHEMA.flatten(initial_state()))
    optimizer = getattr(torch.optim, options.pop("optimizer"))([parameter], **options)
    for round in range(5):
        update = torch.randn(SIZE, generator=torch.Generator().manual_seed(round))
        post(mailbox, "a", update, round=round)
        coordinator = Coordinator(mailbox)  # a new process each round
        coordinator.close_round()
        parameter.grad = -update
        optimizer.step()
        assert torch.allclose(coordinator.adapter, parameter.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("server", SERVERS, ids=["sgd", "momentum", "adam"])
@pytest.mark.parametrize("codec", ["fp32", "topk"])
def test_a_restart_between_any_two_rounds_changes_nothing(tmp_path, server, codec):
    def run(path, restart_at):
        mailbox = found(path, server=server, rounds=4, codec=codec)
        coordinator = Coordinator(mailbox)
        clients = [LightClient(mailbox, name, path / name, max_bytes=None if codec == "fp32" else 400) for name in "ab"]
        for round in range(4):
            if round == restart_at:
                coordinator = Coordinator(FolderMailbox(path, durable=False))
                for client in clients:
                    client.session.close()
                clients = [
                    LightClient(
                        mailbox,
                        c.session.client_id,
                        path / c.session.client_id,
                        max_bytes=None if codec == "fp32" else 400,
                    )
                    for c in clients
                ]
            run_rounds(coordinator, clients, 1)
        return adapter_sha256(path)

    assert len({run(tmp_path / str(at), at) for at in (None, 0, 1, 2, 3)}) == 1


def test_of_two_coordinators_one_gives_way(tmp_path, caplog):
    mailbox = found(tmp_path)
    one, two = Coordinator(mailbox), Coordinator(FolderMailbox(tmp_path, durable=False))
    post(mailbox, "a", delta(1))
    post(mailbox, "b", delta(2))
    first = one.close_round()
    second = two.close_round()
    assert "Another coordinator published round 1 first" in caplog.text
    assert second == first
    assert torch.equal(two.adapter, one.adapter)
    for client in "ab":
        post(mailbox, client, delta(3), round=1)
    assert two.close_round().round == 2  # and can go on from there
    assert one.close_round() == two.record


def test_two_coordinators_with_different_sets_agree_on_the_published_one(tmp_path):
    """The second sees one update more, but the round is taken."""
    mailbox = found(tmp_path)
    one, two = Coordinator(mailbox), Coordinator(mailbox)
    post(mailbox, "a", delta(1))
    post(mailbox, "b", delta(2))
    one.close_round()
    post(mailbox, "c", delta(3))
    assert [u.client_id for u in two.close_round().accepted] == ["a", "b"]
    assert torch.equal(two.adapter, one.adapter)


def test_an_exploding_server_publishes_nothing(tmp_path):
    mailbox = found(tmp_path, server={"optimizer": "SGD", "lr": 3e38}, min_clients=1)
    post(mailbox, "a", 100 * delta(1))
    with pytest.raises(
        NonFiniteError, match=r"made round 1 infinite or NaN; nothing was published\. Start a federation"
    ):
        Coordinator(mailbox).close_round()
    assert mailbox.head() == 0


def test_a_damaged_adapter_is_not_built_upon(tmp_path):
    mailbox = found(tmp_path)
    path = tmp_path / "rounds/000000/adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(
        MailboxError, match=r"sha256 is .*, its round record says .*: the file is damaged or was edited"
    ):
        Coordinator(mailbox)


def test_starting_repairs_the_root(tmp_path):
    mailbox = found(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    Coordinator(mailbox)
    assert adapter_sha256(tmp_path) == adapter_sha256(tmp_path / "rounds/000000")


def test_no_federation_says_how_to_make_one(tmp_path):
    with pytest.raises(MailboxError, match=r"holds no federation\. Check the address, or make one with `fedfstq init"):
        Coordinator(FolderMailbox(tmp_path))


def test_what_cannot_work_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'SGD'"):
        found(tmp_path, server={"optimizer": "SGDD"})
    with pytest.raises(ConfigError, match="unknown codec"):
        found(tmp_path, codec="zip")
    with pytest.raises(MailboxError, match="other names or shapes than the federation's spec"):
        found(tmp_path, schema="0" * 64)
    with pytest.raises(ConfigError, match="min_clients must be a whole number of at least 1"):
        found(tmp_path, min_clients=0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"format": 99}', b'{"format": 1, "round": 0}'])
def test_a_damaged_record_or_spec_is_named(tmp_path, content):
    mailbox = found(tmp_path)
    (tmp_path / "rounds/000000/round.json").write_bytes(content)
    with pytest.raises(MailboxError, match="round record"):
        Coordinator(mailbox)
    (tmp_path / "rounds/000000/spec.json").write_bytes(content)
    with pytest.raises(MailboxError, match="spec"):
        Coordinator(mailbox)


def test_a_lost_race_during_serve(tmp_path):
    mailbox = found(tmp_path)
    coordinator = Coordinator(mailbox)
    post(mailbox, "a", delta(1))
    post(mailbox, "b", delta(1))
    shutil.copytree(tmp_path, tmp_path.with_name("other"))
    other = FolderMailbox(tmp_path.with_name("other"), durable=False)
    Coordinator(other).close_round()
    shutil.copytree(tmp_path.with_name("other") / "rounds/000001", tmp_path / "rounds/000001")
    with pytest.raises(RoundConflictError, match=r"Round 1 of .* is published already"):
        mailbox.publish(1, {"x": b""})
    assert coordinator.serve(once=True).round == 1
