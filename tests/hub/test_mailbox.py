"""Federations on the loopback Hub: the real client, real sessions, codec and coordinator, in each layout."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, HfApi

from fedfstq_hf.errors import ConfigError, MailboxError, MailboxUnavailableError, UpdateConflictError
from fedfstq_hf.federation.control import change_control, dismiss, enrol, pause, resume
from fedfstq_hf.federation.mailbox.hub.mailbox import HubMailbox
from fedfstq_hf.federation.mailbox.open import open_mailbox
from fedfstq_hf.federation.mailbox.protocol import ADAPTER_FILE, RECORD_FILE
from fedfstq_hf.federation.server.coordinator import Coordinator
from tests.federation.light import LightClient, found, run_rounds
from tests.loopback_hub.federation import CLIENTS, LAYOUTS, HubFederation
from tests.loopback_hub.loopback import LoopbackHub

ADAPTER = "adapter_model.safetensors"


@pytest.fixture
def run(hub_here: LoopbackHub) -> HubFederation:
    return HubFederation(hub_here, "own")


def head_record(hub: LoopbackHub) -> dict[str, object]:
    return json.loads(hub.read("org/run", "fedfstq/round.json"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_federation_gives_the_adapter_of_the_folder_mailbox(
    hub_here: LoopbackHub, tmp_path: Path, layout: str
) -> None:
    federation = HubFederation(hub_here, layout, salt="same")
    run_rounds(federation.coordinator(), [federation.client(name) for name in CLIENTS])

    folder = found(tmp_path / "folder", codec="fp32", min_clients=3, rounds=3, salt="same")
    run_rounds(Coordinator(folder, clock=lambda: 0.0), [LightClient(folder, name, None) for name in CLIENTS])
    assert hub_here.read("org/run", ADAPTER) == folder.read_root(ADAPTER)
    record = head_record(hub_here)
    assert (record["round"], record["finished"], len(record["accepted"])) == (3, True, 3)


def test_control_variates_are_those_of_the_folder_mailbox(hub_here: LoopbackHub, tmp_path: Path) -> None:
    shared = {
        "codec": "fp32",
        "min_clients": 3,
        "rounds": 3,
        "salt": "same",
        "scaffold": True,
        "num_clients": 4,
        "clip": None,
    }
    federation = HubFederation(hub_here, "own", **shared)
    run_rounds(federation.coordinator(), [federation.client(name) for name in CLIENTS])
    folder = found(tmp_path / "folder", **shared)
    run_rounds(Coordinator(folder, clock=lambda: 0.0), [LightClient(folder, name, None) for name in CLIENTS])
    assert hub_here.read("org/run", ADAPTER) == folder.read_root(ADAPTER)
    variate = hub_here.read("org/run", "fedfstq/control_variate.safetensors")
    assert variate == folder.read(3, "control_variate.safetensors")
    assert head_record(hub_here)["variate_bytes"] == len(variate)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_the_allowed_files_are_uploaded(hub_here: LoopbackHub, layout: str) -> None:
    federation = HubFederation(hub_here, layout)
    run_rounds(federation.coordinator(), [federation.client(name) for name in CLIENTS])
    per_round = {f"fedfstq/rounds/{r:06d}/{name}" for r in range(4) for name in ("round.json", "frame.safetensors")}
    assert set(hub_here.files("org/run")) - per_round == {
        "adapter_config.json",
        ADAPTER,
        "fedfstq/history.jsonl",
        "fedfstq/mailbox.json",
        "fedfstq/round.json",
        "fedfstq/server_optimizer.safetensors",
        "fedfstq/spec.json",
    }
    for repo in set(hub_here.repos()) - {"org/run"}:
        assert all(path.startswith("rounds/") or path == ".fedfstq.json" for path in hub_here.files(repo))


def test_one_commit_per_round_and_a_tag_at_the_end(run: HubFederation) -> None:
    run_rounds(run.coordinator(), [run.client(name) for name in CLIENTS])
    titles = [commit["title"] for commit in run.hub.commits("org/run")]
    assert titles[:4] == ["Round 3", "Round 2", "Round 1", "Round 0"]
    assert run.hub.refs("org/run")["refs/tags/round-000003"] == run.hub.head("org/run")


def test_clients_cannot_write_each_others_messages_or_the_global_repo(run: HubFederation) -> None:
    run_rounds(run.coordinator(), [run.client(name) for name in CLIENTS], 1)
    intruder = run.mailbox(run.tokens["a"])
    for act in (
        lambda: intruder.post_update(2, "b", b"x"),
        lambda: change_control(intruder, pause("mine")),
        lambda: Coordinator(intruder).rollback(0),
    ):
        with pytest.raises(MailboxError, match="token"):
            act()
    assert head_record(run.hub)["round"] == 1


def test_a_message_posted_twice_makes_one_commit_and_another_one_is_refused(run: HubFederation) -> None:
    mailbox = run.mailbox(run.tokens["a"])
    for _ in range(2):
        mailbox.post_update(0, "a", b"same")
    titles = [commit["title"] for commit in run.hub.commits("org/run-a")]
    assert titles == ["Round 0", "Made for a federation", "initial commit"]
    with pytest.raises(UpdateConflictError, match="second process"):
        run.mailbox(run.tokens["a"]).post_update(0, "a", b"other")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fault", ["500-after", "lost"])
def test_a_lost_answer_doubles_nothing(hub_here: LoopbackHub, layout: str, fault: str) -> None:
    federation = HubFederation(hub_here, layout)
    clients = [federation.client(name) for name in CLIENTS]
    repo = "org/run-a" if layout == "own" else "org/run-mailbox"
    hub_here.faults.once(fault, path=f"{repo}/commit", method="POST", user="user-a")
    hub_here.faults.once(fault, path="org/run/commit", method="POST", user="owner")
    run_rounds(federation.coordinator(), clients)
    assert [commit["title"] for commit in hub_here.commits("org/run")].count("Round 1") == 1
    if layout == "own":
        assert [commit["title"] for commit in hub_here.commits(repo)].count("Round 0") == 1
    if layout == "pull-request":
        assert len(hub_here.discussions(repo)) == len(CLIENTS)
    assert [len(update["accepted"]) for update in federation.records()] == [3, 3, 3]


@pytest.mark.parametrize("fault", ["500", "lost", "hang"])
def test_an_upload_that_fails_for_long_is_repeated(
    run: HubFederation, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDFSTQ_HUB_TIMEOUT", "0.3")
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    client = run.client("a")
    run.hub.faults.once(fault, method="PUT", times=8)  # more than the client's own five retries
    assert client.step()
    assert run.hub.files("org/run-a") == [".fedfstq.json", "rounds/000000.safetensors"]


@pytest.mark.parametrize("fault", ["corrupt", "cut", "500", "503", "hang"])
def test_a_damaged_download_is_repeated(run: HubFederation, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDFSTQ_HUB_TIMEOUT", "0.5")
    client = run.client("a")
    run.hub.faults.once(fault, path=ADAPTER, method="GET", times=2)
    assert client.step()
    assert run.hub.log.entries(path=ADAPTER, fault=fault)
    assert client.session.pending is not None


def test_stale_reads_are_survived(run: HubFederation) -> None:
    coordinator, clients = run.coordinator(), [run.client(name) for name in CLIENTS]
    run.hub.faults.stale_seconds = 0.4
    deadline = time.monotonic() + 120  # by the clock, as staleness is: a count of looks would hang on their speed
    while not all(client.done for client in clients) and time.monotonic() < deadline:
        for client in clients:
            client.step()
        if coordinator.ready():
            coordinator.close_round()
    assert [len(record["accepted"]) for record in run.records()] == [3, 3, 3]


def test_an_oversized_message_is_refused_before_it_is_downloaded(run: HubFederation) -> None:
    run.mailbox(run.tokens["c"]).post_update(0, "c", bytes(100_000))
    for name in "ab":
        run.client(name).step()
    coordinator = run.coordinator()
    run.hub.log.clear()
    assert coordinator.close_round() is None
    assert not run.hub.log.entries(path="run-c.*rounds", method="GET", user="owner")


def test_two_coordinators_one_gives_way(run: HubFederation) -> None:
    first, second = run.coordinator(), run.coordinator()
    for name in CLIENTS:
        run.client(name).step()
    assert first.close_round() is not None
    record = second.close_round()
    assert record == first.record
    assert [commit["title"] for commit in run.hub.commits("org/run")].count("Round 1") == 1


def test_a_card_edited_between_two_rounds_is_no_conflict(run: HubFederation) -> None:
    coordinator, clients = run.coordinator(), [run.client(name) for name in CLIENTS]
    run_rounds(coordinator, clients, 1)
    run.hub.write("org/run", {"README.md": b"# Ours, edited\n", "notes.txt": b"kept"})
    run_rounds(coordinator, clients, 1)
    assert coordinator.record.round == 2
    assert run.hub.read("org/run", "README.md") == b"# Ours, edited\n"
    assert run.hub.read("org/run", "notes.txt") == b"kept"


def test_a_card_that_the_hub_refuses_does_not_stop_the_round(
    run: HubFederation, caplog: pytest.LogCaptureFixture
) -> None:
    mailbox = run.mailbox(run.owner)
    assert mailbox.head() == 0
    record = {"round": 1}
    broken = b"---\nlicense: [unclosed\n---\n"
    mailbox.publish(1, {RECORD_FILE: json.dumps(record).encode()}, lambda read: {"README.md": broken})
    assert head_record(run.hub) == record
    assert "README.md" not in run.hub.files("org/run")
    assert "refuses the model card" in caplog.text


def test_a_repo_with_foreign_files_is_left_alone(hub_here: LoopbackHub) -> None:
    hub_here.org("org")
    hub_here.repo("org/run")
    before = hub_here.write("org/run", {ADAPTER: b"somebody's adapter"})
    with pytest.raises(MailboxError, match="already holds adapter_model"):
        HubFederation(hub_here, "own", org=False)
    assert hub_here.head("org/run") == before


def test_enrolment_pause_and_selection_through_the_hub(run: HubFederation, caplog: pytest.LogCaptureFixture) -> None:
    owner = run.mailbox(run.owner)
    change_control(owner, enrol(CLIENTS, max_examples=5))
    change_control(owner, pause("maintenance"))
    coordinator = run.coordinator()
    for name in CLIENTS:
        run.client(name).step()
    assert coordinator.paused == "maintenance"
    assert not coordinator.ready()
    change_control(run.mailbox(run.owner), resume)
    coordinator.mailbox.head()
    assert coordinator.ready()
    change_control(owner, dismiss(["c"]))
    coordinator.mailbox.head()
    assert coordinator.close_round() is None
    stranger = run.client("c")
    with pytest.raises(MailboxError, match="not enrolled"):
        stranger.step()


def test_earlier_rounds_are_read_from_their_commits(run: HubFederation) -> None:
    coordinator, clients = run.coordinator(), [run.client(name) for name in CLIENTS]
    run_rounds(coordinator, clients, 2)
    mailbox = run.mailbox(run.owner)
    for round in range(3):
        record = json.loads(mailbox.read(round, RECORD_FILE))
        assert hashlib.sha256(mailbox.read(round, ADAPTER_FILE)).hexdigest() == record["adapter_sha256"]
    restored = coordinator.rollback(1)
    assert restored.adapter_sha256 == json.loads(mailbox.read(1, RECORD_FILE))["adapter_sha256"]


def test_metrics_of_coordinator_and_clients_are_read_together(run: HubFederation) -> None:
    owner, client = run.mailbox(run.owner), run.mailbox(run.tokens["a"])
    owner.head()
    owner.post_metric(0, "test", {"eval_loss": 1.5})
    owner.post_metric(1, "test", {"eval_loss": 1.25})
    client.post_metric(0, "local", {"eval_loss": 2.0}, client_id="a")
    with pytest.raises(MailboxError, match="token"):
        client.post_metric(0, "test", {"eval_loss": 0.0})
    run.hub.write("org/run-a", {"metrics.json": run.hub.read("org/run-a", "metrics.json")})
    reader = run.mailbox(run.owner)
    reader.head()
    assert reader.read_metrics(CLIENTS) == {
        0: {"test": {"eval_loss": 1.5}, "local@a": {"eval_loss": 2.0}},
        1: {"test": {"eval_loss": 1.25}},
    }


def test_old_messages_of_a_shared_repo_are_removed(hub_here: LoopbackHub) -> None:
    federation = HubFederation(hub_here, "shared", rounds=12, min_clients=1)
    run_rounds(federation.coordinator(), [federation.client("a")])
    kept = [f"rounds/{r:06d}/deltas/a.safetensors" for r in range(8, 12)]
    assert hub_here.files("org/run-mailbox") == [".fedfstq.json", *kept]


def test_pull_requests_belong_to_their_accounts_and_are_closed_at_the_end(hub_here: LoopbackHub) -> None:
    federation = HubFederation(hub_here, "pull-request", min_clients=1, rounds=1)
    change_control(federation.mailbox(federation.owner), enrol(["a"], account="user-a"))
    intruder = hub_here.user("intruder", "write", org="org", member="read")
    HfApi(token=intruder).create_commit(
        "org/run-mailbox",
        [CommitOperationAdd("rounds/000000.safetensors", b"x")],
        commit_message="Updates of client a",
        create_pr=True,
    )
    federation.client("a").step()
    coordinator = federation.coordinator()
    assert coordinator.close_round() is not None
    assert [update.client_id for update in coordinator.record.accepted] == ["a"]
    assert {entry["status"] for entry in hub_here.discussions("org/run-mailbox")} == {"closed"}


@pytest.mark.parametrize(
    ("token", "words"),
    [("missing", "hf auth login"), ("invalid", "hf auth login"), ("stranger", "hf auth login")],
)
def test_a_token_without_access_is_told_what_to_do(run: HubFederation, token: str, words: str) -> None:
    run.hub.org("elsewhere")
    tokens = {
        "missing": None,
        "invalid": "hf_thisTokenIsSecret",
        "stranger": run.hub.user("stranger", "write", org="elsewhere"),
    }
    with pytest.raises(MailboxError, match=words) as caught:
        HubMailbox("hf://org/run", token=tokens[token] or False, patience=1.0).head()
    assert "hf_thisTokenIsSecret" not in str(caught.value)


def test_a_read_only_token_cannot_found_or_coordinate(hub_here: LoopbackHub) -> None:
    federation = HubFederation(hub_here, "own", min_clients=1)
    reader = hub_here.user("reader", "read", org="org")
    federation.client("a").step()
    with pytest.raises(MailboxError, match="write permission"):
        Coordinator(federation.mailbox(reader)).close_round()
    with pytest.raises(MailboxError, match="token"):
        HubMailbox("hf://org/other", token=reader, create=True, patience=1.0).publish(0, {RECORD_FILE: b"{}"})


def test_a_missing_organisation_is_named(hub_here: LoopbackHub) -> None:
    token = hub_here.user("owner", "write")
    with pytest.raises(MailboxError, match="nobody/run"):
        HubMailbox("hf://nobody/run", token=token, create=True, patience=1.0).publish(0, {RECORD_FILE: b"{}"})


def test_a_full_quota_says_so_and_loses_nothing(run: HubFederation) -> None:
    client = run.client("a")
    run.hub.faults.once("quota", path="run-a")
    with pytest.raises(MailboxError, match="Free space"):
        client.step()
    assert client.session.pending is not None
    client.step()
    assert run.hub.files("org/run-a") == [".fedfstq.json", "rounds/000000.safetensors"]


def test_offline_mode_is_named(run: HubFederation, monkeypatch: pytest.MonkeyPatch) -> None:
    mailbox = run.mailbox(run.owner)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(MailboxError, match="HF_HUB_OFFLINE"):
        mailbox.head()


def test_an_unreachable_hub_is_given_up_after_the_patience(
    run: HubFederation, caplog: pytest.LogCaptureFixture
) -> None:
    mailbox = HubMailbox("hf://org/run", token=run.owner, patience=0.5)
    run.hub.faults.configure(rate=1.0, kinds=["500"])
    with pytest.raises(MailboxUnavailableError, match="Nothing is lost"):
        mailbox.head()


@pytest.mark.parametrize("address", ["hf://org", "hf://", "hf://a/b/c", "hf://org/re po", "hf://org/--x"])
def test_a_bad_address_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="hf://ORG/REPO"):
        open_mailbox(address)


def test_waiting_for_a_round_costs_one_request_a_look(run: HubFederation) -> None:
    client = run.client("a")
    client.step()
    client.step()
    run.hub.log.clear()
    client.step()
    looks = run.hub.log.entries(path="/resolve/")
    assert [entry.method for entry in looks] == ["HEAD"]
    assert len(run.hub.log.entries()) == 2  # the Hub redirects the request once, on the same server


def test_no_secret_is_logged(run: HubFederation, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    run.hub.faults.once("500", path="commit", method="POST", times=2)
    run_rounds(run.coordinator(), [run.client(name) for name in CLIENTS], 1)
    for token in (run.owner, *run.tokens.values()):
        assert token not in caplog.text
        for repo in run.hub.repos():
            assert all(token.encode() not in run.hub.read(repo, path) for path in run.hub.files(repo))
