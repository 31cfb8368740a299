"""A client spoils its own place on the Hub: that costs nobody else anything."""

from __future__ import annotations

import dataclasses
import json
import logging

import pytest
from huggingface_hub import HfApi

from fedfstq_hf.errors import MailboxUnavailableError, MessageError
from fedfstq_hf.federation.control import change_control, enrol
from fedfstq_hf.federation.mailbox.hub import posts
from fedfstq_hf.federation.mailbox.hub.mailbox import HubMailbox
from tests.loopback_hub.federation import CLIENTS, HubFederation
from tests.loopback_hub.loopback import LoopbackHub


@pytest.fixture
def run(hub_here: LoopbackHub) -> HubFederation:
    return HubFederation(hub_here, "own", min_clients=2)


def names(mailbox: HubMailbox, round: int = 0, clients: tuple[str, ...] | None = CLIENTS) -> list[str]:
    return [ref.client_id for ref in mailbox.list_updates(round, clients)]


def looks(hub: LoopbackHub, user: str = "owner", **equal: object) -> int:
    """Requests for files, without the redirect that follows each."""
    return len(hub.log.entries(path="/resolve/", user=user, **equal))


def posted(run: HubFederation, message: bytes = b"message of ") -> None:
    for name in CLIENTS:
        run.mailbox(run.tokens[name]).post_update(0, name, message + name.encode())


def spoil(run: HubFederation, how: str, name: str = "c") -> None:
    api, repo = HfApi(token=run.owner), f"org/run-{name}"
    if how == "deleted":
        api.delete_repo(repo)
    elif how == "gated":
        run.hub.state.store.get(repo, "model").gated = "manual"
        run.hub.state.accounts.organizations["org"].members.pop("owner")
    elif how == "emptied":
        api.delete_files(repo, ["rounds/*"])
        api.super_squash_history(repo)
    elif how == "replaced":
        api.delete_repo(repo)
        run.hub.repo(repo, creator="owner")
        run.hub.write(repo, {"rounds/000000.safetensors": b"another"})
    elif how == "folder":
        api.delete_files(repo, ["rounds/*"])
        api.super_squash_history(repo)
        run.hub.write(repo, {"rounds/000000.safetensors/x": b"a file in its way"})


SPOILT = ["deleted", "emptied", "replaced", "folder"]


@pytest.mark.parametrize("how", SPOILT)
@pytest.mark.parametrize("when", ["before the look", "after the look"])
def test_the_round_closes_with_the_others(run: HubFederation, how: str, when: str) -> None:
    for name in CLIENTS:
        run.client(name).step()
    coordinator = run.coordinator()
    if when == "after the look":
        assert coordinator.ready()
    spoil(run, how)
    assert coordinator.ready()
    record = coordinator.close_round()
    assert record is not None
    assert [entry.client_id for entry in record.accepted] == ["a", "b"]
    assert [entry.client_id for entry in record.refused] == (["c"] if when == "after the look" else [])


@pytest.mark.parametrize("how", SPOILT)
def test_what_is_gone_or_changed_is_a_fault_of_that_message(run: HubFederation, how: str) -> None:
    posted(run)
    mailbox = run.mailbox(run.owner)
    refs = mailbox.list_updates(0, CLIENTS)
    assert mailbox.read_update(refs[1], max_bytes=99) == b"message of b"
    spoil(run, how)
    spoil(run, how, "b")
    with pytest.raises(MessageError, match=r"no longer what it was|cannot be read"):
        mailbox.read_update(refs[2], max_bytes=99)
    assert mailbox.read_update(refs[1], max_bytes=99) == b"message of b"  # as it was read first
    assert mailbox.read_update(refs[0], max_bytes=99) == b"message of a"
    if how == "deleted":
        with pytest.raises(MessageError, match="cannot be read"):
            mailbox.read_attachment("c", "saliency.safetensors", max_bytes=99)
    else:
        assert mailbox.read_attachment("c", "saliency.safetensors", max_bytes=99) is None


def test_a_gated_or_hidden_repo_is_left_out(run: HubFederation, caplog: pytest.LogCaptureFixture) -> None:
    posted(run)
    outsider = run.hub.user("reader", "read", org="elsewhere")
    for repo in ("org/run", "org/run-a", "org/run-c"):
        HfApi(token=run.owner).update_repo_settings(repo, private=False)
    run.hub.gate("org/run-c")
    mailbox = run.mailbox(outsider)  # sees a's, not b's, and c's without its files
    for _ in range(2):
        assert names(mailbox) == ["a"]
    told = [record.message for record in caplog.records if "client c" in record.message.lower()]
    assert len(told) == 1
    assert "gated" in told[0]
    with pytest.raises(MessageError, match="gated"):
        mailbox.read_attachment("c", "saliency.safetensors", max_bytes=99)
    assert mailbox.read_metrics(CLIENTS) == {}


def test_a_message_that_is_replaced_in_a_shared_repo_is_refused(hub_here: LoopbackHub) -> None:
    run = HubFederation(hub_here, "shared")
    posted(run)
    mailbox = run.mailbox(run.owner)
    refs = mailbox.list_updates(0, CLIENTS)
    run.hub.write("org/run-mailbox", {"rounds/000000/deltas/c.safetensors": b"another"}, author="user-a")
    assert mailbox.list_updates(0, CLIENTS) == refs
    with pytest.raises(MessageError, match="no longer what it was"):
        mailbox.read_update(refs[2], max_bytes=99)


def test_a_file_without_a_digest_is_read_once(run: HubFederation) -> None:
    """A client can have its messages stored as plain files, for which the Hub names no sha256."""
    posted(run)
    run.hub.write("org/run-c", {"rounds/000001.safetensors": b"first"})
    mailbox = run.mailbox(run.owner)
    (ref,) = mailbox.list_updates(1, CLIENTS)
    assert (ref.client_id, ref.sha256) == ("c", "")
    assert mailbox.read_update(ref, max_bytes=99) == b"first"
    HfApi(token=run.owner).super_squash_history("org/run-c")
    run.hub.write("org/run-c", {"rounds/000001.safetensors": b"other"})
    assert mailbox.read_update(ref, max_bytes=99) == b"first"


def test_a_closed_pull_request_is_looked_for_anew(hub_here: LoopbackHub) -> None:
    run = HubFederation(hub_here, "pull-request", min_clients=2)
    posted(run)
    mailbox = run.mailbox(run.owner)
    refs = mailbox.list_updates(0, CLIENTS)
    number = {entry["title"][-1]: entry["num"] for entry in hub_here.discussions("org/run-mailbox")}["c"]
    HfApi(token=run.owner).change_discussion_status("org/run-mailbox", number, "closed")
    assert names(mailbox, 1) == []  # a look, at which c has none
    with pytest.raises(MessageError, match="closed"):
        mailbox.read_update(refs[2], max_bytes=99)
    assert mailbox.read_attachment("c", "saliency.safetensors", max_bytes=99) is None
    run.mailbox(run.tokens["c"]).post_update(1, "c", b"by another pull request")
    (ref,) = mailbox.list_updates(1, CLIENTS)
    assert mailbox.read_update(ref, max_bytes=99) == b"by another pull request"


# -- a place that does not answer --------------------------------------------------------------------------------------


def test_a_place_that_does_not_answer_holds_nobody(
    run: HubFederation, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(posts, "CLIENT_SECONDS", 0.5)
    posted(run)
    run.hub.faults.once("500", path="run-c/resolve", times=10**6)
    mailbox = run.mailbox(run.owner)
    assert names(mailbox) == ["a", "b"]
    tried = looks(run.hub, status=500)
    assert 2 <= tried <= 5
    assert names(mailbox) == ["a", "b"]
    assert looks(run.hub, status=500) == tried + 1  # once, after a look in vain
    assert len([record for record in caplog.records if "Client c is left out" in record.message]) <= 2
    run.hub.faults.clear()
    assert names(mailbox) == list(CLIENTS)


def test_a_message_that_never_arrives_is_refused(run: HubFederation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(posts, "CLIENT_SECONDS", 0.3)
    for name in CLIENTS:
        run.client(name).step()
    coordinator = run.coordinator()
    assert coordinator.ready()
    run.hub.faults.once("503", path="run-c/", times=10**6)
    record = coordinator.close_round()
    assert record is not None
    assert [entry.client_id for entry in record.accepted] == ["a", "b"]
    (refused,) = record.refused
    assert "does not answer" in refused.reason


def test_nobody_is_refused_while_the_whole_hub_is_out(run: HubFederation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(posts, "CLIENT_SECONDS", 0.3)
    posted(run)
    mailbox = HubMailbox("hf://org/run", token=run.owner, patience=1.0)
    refs = mailbox.list_updates(0, CLIENTS)
    run.hub.faults.configure(rate=1.0, kinds=["500"])
    with pytest.raises(MailboxUnavailableError, match=r"could not|Could not reach .*org/run"):
        mailbox.read_update(refs[0], max_bytes=99)
    with pytest.raises(MailboxUnavailableError):
        mailbox.read_attachment("a", "saliency.safetensors", max_bytes=99)
    with pytest.raises(MailboxUnavailableError):
        mailbox.head()
    run.hub.faults.clear()
    run.hub.faults.once("500", path="/objects/", times=10**6)  # the storage alone
    with pytest.raises(MailboxUnavailableError):
        mailbox.read_update(refs[0], max_bytes=99)
    run.hub.faults.clear()
    assert mailbox.read_update(refs[0], max_bytes=99) == b"message of a"


def test_bytes_of_attachments_are_counted_without_waiting_for_one_client(
    run: HubFederation, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(posts, "CLIENT_SECONDS", 0.3)
    for name in "ab":
        run.mailbox(run.tokens[name]).post_attachment(name, "saliency.safetensors", bytes(100))
    run.hub.faults.once("500", path="run-b/", times=10**6)
    mailbox = run.mailbox(run.owner)
    assert [mailbox.attachment_bytes(name, "saliency.safetensors") for name in CLIENTS] == [100, 0, 0]
    assert "bytes of saliency.safetensors of client b are not counted" in caplog.text


# -- metrics -----------------------------------------------------------------------------------------------------------

GOOD = {"0": {"test": {"eval_loss": 2.0}}}


@pytest.mark.parametrize(
    ("data", "left"),
    [
        (b"{" * 10, {}),
        (b"[" * 100_000, {}),
        (b'{"0": ' + b'{"test": ' * 5000 + b"1" + b"}" * 5001, {}),
        (b"[1, 2]", {}),
        (b"\xff\xfe", {}),
        (b'{"0": {"test": {"eval_loss": NaN}}}', {}),
        (b'{"0": {"test": {"eval_loss": 1e999}}}', {}),
        (b'{"0": {"test": {"eval_loss": 1e308, "other": 1}}}', {0: {"test@c": {"other": 1}}}),
        (b'{"0": {"test": {"eval_loss": "2", "x": null, "y": true, "z": [1], "w": {}}}}', {0: {"test@c": {}}}),
        (
            b'{"0": {"test": {"\\u001b[2J": 1, "": 2, "' + b"n" * 65 + b'": 3, "ok": -4.5}}}',
            {0: {"test@c": {"ok": -4.5}}},
        ),
        (b'{"0": {"../x": {"y": 1}, "a@b": {"y": 1}, "t": 3}, "-1": {}, "x": {}, "1": 7}', {}),
        (b" " * (10**6 + 1), {}),
        (json.dumps({"0": {"test": {"eval_loss": 10**300}}}).encode(), {}),
    ],
)
def test_what_are_no_metrics_is_left_out(
    run: HubFederation, caplog: pytest.LogCaptureFixture, data: bytes, left: dict[int, object]
) -> None:
    for name in "ac":
        run.mailbox(run.tokens[name]).post_metric(0, "test", {"eval_loss": 2.0}, client_id=name)
    run.hub.write("org/run-c", {"metrics.json": data})
    reader = run.mailbox(run.owner)
    reader.head()
    expected = {0: {"test@a": {"eval_loss": 2.0}}}
    for round, sources in left.items():
        expected[round] = expected.get(round, {}) | sources
    assert reader.read_metrics(CLIENTS) == expected
    assert "client c" in caplog.text


def test_metrics_that_did_not_change_cost_one_request_a_client(run: HubFederation) -> None:
    for name in CLIENTS:
        run.mailbox(run.tokens[name]).post_metric(0, "test", {"eval_loss": 2.0}, client_id=name)
    reader = run.mailbox(run.owner)
    reader.head()
    first = reader.read_metrics(CLIENTS)
    assert sorted(first[0]) == ["test@a", "test@b", "test@c"]
    run.hub.log.clear()
    assert reader.read_metrics(CLIENTS) == first
    assert looks(run.hub, method="HEAD") == 3
    assert [entry.path for entry in run.hub.log.entries(path="run-[abc]/", method="GET")] == []
    run.mailbox(run.tokens["b"]).post_metric(1, "test", {"eval_loss": 1.5}, client_id="b")
    assert reader.read_metrics(CLIENTS)[1] == {"test@b": {"eval_loss": 1.5}}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e308, "2", None, True, 10**400])
def test_a_posts_no_metric_that_readers_leave_out(run: HubFederation, value: object) -> None:
    mailbox = run.mailbox(run.tokens["a"])
    mailbox.post_metric(0, "test", {"eval_loss": 2.0}, client_id="a")
    with pytest.raises(Exception, match=r"eval_loss = .* cannot be posted") as caught:
        mailbox.post_metric(1, "test", {"eval_loss": value}, client_id="a")
    assert type(caught.value).__name__ == "MailboxError"
    assert json.loads(run.hub.read("org/run-a", "metrics.json")) == GOOD


def test_an_attachment_that_is_too_large_is_a_fault_of_the_message(run: HubFederation) -> None:
    run.mailbox(run.tokens["a"]).post_attachment("a", "saliency.safetensors", bytes(100))
    mailbox = run.mailbox(run.owner)
    assert mailbox.read_attachment("a", "saliency.safetensors", max_bytes=100) == bytes(100)
    with pytest.raises(MessageError, match="100 bytes"):
        mailbox.read_attachment("a", "saliency.safetensors", max_bytes=99)


# -- whose a repo is ---------------------------------------------------------------------------------------------------


def test_clients_of_a_federation_whose_name_goes_on_are_not_read(
    run: HubFederation, caplog: pytest.LogCaptureFixture
) -> None:
    """org/run-lora's client a writes to org/run-lora-a, which looks like client lora-a of org/run."""
    other = HubFederation(run.hub, "own", org=False, address="hf://org/run-lora")
    other.mailbox(other.tokens["a"]).post_update(0, "a", b"of the other federation")
    posted(run)
    mailbox = run.mailbox(run.owner)
    assert names(mailbox, clients=None) == ["a", "b", "c"]
    assert (
        "org/run-lora-a belongs to client a of hf://org/run-lora, not to client lora-a of hf://org/run" in caplog.text
    )
    run.hub.log.clear()
    assert names(mailbox, 1, clients=None) == []
    assert run.hub.log.entries(path="run-lora-a") == []  # known by now
    change_control(run.mailbox(run.owner), enrol(["a", "lora-a"]))
    mailbox.head()
    assert names(mailbox, clients=("a", "lora-a")) == ["a"]
    assert mailbox.read_metrics(["lora-a"]) == {}


def test_a_repo_without_a_marker_is_no_clients(run: HubFederation, caplog: pytest.LogCaptureFixture) -> None:
    run.hub.repo("org/run-x", private=True)
    run.hub.write("org/run-x", {"rounds/000000.safetensors": b"x"})
    run.hub.repo("org/run---", private=True)
    run.hub.write("org/run---", {"rounds/000000.safetensors": b"x"})
    posted(run)
    assert names(run.mailbox(run.owner), clients=None) == ["a", "b", "c"]
    assert "org/run-x was not made by a client" in caplog.text


# -- what a look costs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["own", "pull-request"])
def test_a_look_asks_once_for_each_client_that_is_not_found(hub_here: LoopbackHub, layout: str) -> None:
    run = HubFederation(hub_here, layout)
    mailbox = run.mailbox(run.owner)
    for name in "ab":
        run.mailbox(run.tokens[name]).post_update(0, name, b"message")
    assert names(mailbox) == ["a", "b"]
    hub_here.log.clear()
    assert names(mailbox) == ["a", "b"]
    assert looks(hub_here) == (1 if layout == "own" else 0)  # c has no pull request to look at
    assert len(hub_here.log.entries(path="/discussions", user="owner")) == (layout == "pull-request")
    run.mailbox(run.tokens["c"]).post_update(0, "c", b"message")
    assert names(mailbox) == ["a", "b", "c"]
    hub_here.log.clear()
    assert names(mailbox) == ["a", "b", "c"]
    assert hub_here.log.entries(user="owner") == []


def test_a_look_at_many_messages_is_no_search_in_a_list(run: HubFederation, monkeypatch: pytest.MonkeyPatch) -> None:
    """20,000 messages were compared with 20,000 names, one by one."""
    posted(run)
    mailbox = run.mailbox(run.owner)
    (one, *_) = mailbox.list_updates(0, CLIENTS)
    clients = [f"client-{number}" for number in range(20_000)]
    monkeypatch.setattr(
        mailbox._posts, "_look_for", lambda round, second, client, until: dataclasses.replace(one, client_id=client)
    )
    compared = Counting.comparisons = 0
    mailbox.list_updates(0, list(map(Counting, clients)))
    compared = Counting.comparisons
    assert compared < 20 * len(clients)


class Counting(str):
    """Text that counts how often it is compared."""

    comparisons = 0

    def __eq__(self, other: object) -> bool:
        Counting.comparisons += 1
        return str.__eq__(self, other)

    __hash__ = str.__hash__


def test_a_pull_request_that_cannot_be_closed_leaves_no_other_open(
    hub_here: LoopbackHub, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    run = HubFederation(hub_here, "pull-request", min_clients=2)
    posted(run)
    hub_here.faults.once("quota", path="discussions/2/status")
    run.mailbox(run.owner).housekeep(1, clients=3, keep_rounds=2, tag=False, finished=True)
    assert [entry["status"] for entry in hub_here.discussions("org/run-mailbox")] == ["closed", "open", "closed"]
    assert "close pull request 2" in caplog.text
