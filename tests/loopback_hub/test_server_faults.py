"""Every fault of the loopback Hub, and what the real client makes of it."""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import CommitOperationAdd, constants
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import httpx

from tests.loopback_hub.conftest import push

BINARY = bytes(range(256)) * 80  # 20 kB that go to LFS
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def naps(monkeypatch):
    """The waits of the client's own retries, in seconds: noted, not slept."""
    naps: list[float] = []

    clock = SimpleNamespace(**{**vars(time), "sleep": naps.append})
    monkeypatch.setattr("huggingface_hub.utils._http.time", clock)
    monkeypatch.setattr("huggingface_hub.file_download.time", clock)
    return naps


def refused(status, call, *args, **kwargs):
    """The text of the error with that status which the call must raise."""
    with pytest.raises(HfHubHTTPError) as error:
        call(*args, **kwargs)
    assert error.value.response.status_code == status
    return str(error.value)


def test_plain_commits_at_the_same_time_are_refused(hub, client, run):
    hub.faults.commit_seconds = 0.5
    barrier, outcomes = threading.Barrier(8), []

    def write(n):
        barrier.wait()
        try:
            push(client, run, **{f"rounds/{n}.bin": BINARY[n:]})
            outcomes.append(200)
        except HfHubHTTPError as error:
            outcomes.append(error.response.status_code)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(outcomes) == {200, 409}
    assert outcomes.count(200) == len(hub.files(run))


def test_repositories_are_busy_each_for_itself(hub, client, run):
    other = client.create_repo("lab/other").repo_id
    hub.faults.commit_seconds = 0.01
    with hub.state.store.get(run).exclusive(0):
        push(client, other, a=b"1")
        refused(409, push, client, run, a=b"1")
        refused(409, client.super_squash_history, run)
    push(client, run, a=b"1")


@pytest.mark.parametrize(
    ("kind", "status", "words"),
    [
        ("409", 409, "Another commit operation is in progress"),
        ("412", 412, "A commit has happened since"),
        ("429", 429, "Too Many Requests"),
        ("429-ratelimit", 429, "you have reached your 'api' rate limit"),
        ("commit-rate", 429, r"rate limit for repository commits \(128 per hour\)"),
        ("quota", 403, "storage limit reached"),
        ("507", 507, "Storage quota exceeded"),
        ("500", 500, "Internal Error"),
        ("503", 503, "Service Unavailable"),
    ],
)
def test_a_commit_refused_is_raised_at_once_and_not_done(hub, client, run, naps, kind, status, words):
    hub.faults.once(kind, "/commit/")
    before = hub.head(run)
    with pytest.raises(HfHubHTTPError, match=words) as error:
        push(client, run, a=b"1")
    assert error.value.response.status_code == status
    assert (hub.head(run), naps) == (before, [])
    push(client, run, a=b"1")
    assert [entry.fault for entry in hub.log.entries("/commit/")] == [kind, None]


@pytest.mark.parametrize("path", ["/preupload/", "objects/batch", "^/objects/", "objects/verify"])
@pytest.mark.parametrize(("kind", "nap"), [("500", 1), ("429", 8), ("429-ratelimit", 8), ("lost", 1)])
def test_the_calls_before_the_commit_are_retried(hub, client, run, naps, path, kind, nap):
    hub.faults.configure(retry_after=7)
    hub.faults.once(kind, path)
    push(client, run, **{"a.bin": BINARY})
    assert naps == [nap]
    assert hub.read(run, "a.bin") == BINARY


@pytest.mark.parametrize("kind", ["500-after", "lost"])
def test_after_a_lost_response_a_new_operation_makes_no_second_commit_and_the_same_one_does(hub, client, run, kind):
    hub.faults.once(kind, "/commit/")
    operation = CommitOperationAdd("a.bin", BINARY)
    with pytest.raises((HfHubHTTPError, httpx.RemoteProtocolError, httpx.ReadError)):
        client.create_commit(run, [operation], commit_message="push")
    assert (hub.files(run), len(hub.commits(run))) == (["a.bin"], 2)
    push(client, run, **{"a.bin": BINARY})
    assert len(hub.commits(run)) == 2
    client.create_commit(run, [operation], commit_message="push")
    assert len(hub.commits(run)) == 3


def test_after_a_lost_response_a_second_pull_request_is_opened(hub, client, run):
    hub.faults.once("500-after", "/commit/")
    ask = {"operations": [CommitOperationAdd("a", b"1")], "commit_message": "push", "create_pr": True}
    refused(500, client.create_commit, run, **ask)
    assert client.create_commit(run, **ask).pr_num == 2


def test_a_fifth_of_the_requests_failing_lets_no_push_through(hub, client, run, naps):
    """A push is five calls, and the fifth is the commit."""
    for n in range(3):
        hub.faults.once("500", "/commit/")
        refused(500, push, client, run, **{f"{n}.bin": BINARY[n:]})
    assert hub.files(run) == []


def test_a_cut_download_is_resumed(hub, client, run, naps, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)  # of 10 MB: shorter files start from 0 again
    push(client, run, **{"a.bin": BINARY, "a.txt": b"0123456789"})
    for path in ("a.bin", "a.txt"):
        hub.faults.once("cut", "/objects/|/resolve-cache/", method="GET")
        assert Path(client.hf_hub_download(run, path)).read_bytes() == hub.read(run, path)
    assert [entry.status for entry in hub.log.entries("/objects/", method="GET")] == [200, 206]
    assert hub.log.entries(fault="cut")[0].sent == len(BINARY) // 2


def test_a_failing_object_storage_is_raised(hub, client, run):
    push(client, run, **{"a.bin": BINARY})
    hub.faults.once("500", "^/objects/", method="GET")
    refused(500, client.hf_hub_download, run, "a.bin")


def test_a_corrupt_download_is_accepted_and_only_checksums_find_it(hub, client, run):
    push(client, run, **{"a.bin": BINARY})
    hub.faults.once("corrupt", "/objects/")
    got = Path(client.hf_hub_download(run, "a.bin")).read_bytes()
    assert len(got) == len(BINARY)
    assert got != BINARY
    assert [mismatch["path"] for mismatch in client.verify_repo_checksums(run).mismatches] == ["a.bin"]


def test_reads_without_retries_are_raised_or_answered_from_the_cache(hub, client, run):
    first = push(client, run, a=b"1")
    client.snapshot_download(run)
    push(client, run, a=b"2", b=b"3")
    hub.faults.once("500", f"/api/models/{run}")
    refused(500, client.repo_info, run)
    hub.faults.once("500", f"/api/models/{run}")
    assert client.snapshot_download(run).endswith(first.oid)
    hub.faults.once("500", "/resolve/", method="HEAD")
    assert Path(client.hf_hub_download(run, "a")).read_bytes() == b"1"
    assert Path(client.hf_hub_download(run, "a")).read_bytes() == b"2"


def test_stale_reads_fail_with_a_parent_and_pass_without(hub, client, run):
    first, second = push(client, run, a=b"1").oid, push(client, run, a=b"2").oid
    hub.faults.once("stale", f"/api/models/{run}$")
    seen = client.repo_info(run).sha
    assert seen == first
    write = {"path_or_fileobj": b"3", "path_in_repo": "a", "repo_id": run}
    refused(412, client.upload_file, **write, parent_commit=seen)
    assert client.repo_info(run).sha == second
    client.upload_file(**write)
    assert hub.read(run, "a") == b"3"


def test_all_reads_may_lag_for_a_while(hub, client, run, monkeypatch):
    now = time.monotonic()
    monkeypatch.setattr("tests.loopback_hub.repository.time", SimpleNamespace(monotonic=lambda: now))
    first = push(client, run, a=b"1").oid
    now += 100
    hub.faults.stale_seconds = 60
    second = push(client, run, a=b"2").oid
    assert client.repo_info(run).sha == client.list_repo_commits(run)[0].commit_id == first
    assert client.list_repo_refs(run).branches[0].target_commit == first
    assert Path(client.hf_hub_download(run, "a")).read_bytes() == b"1"
    assert client.repo_info(run, revision=second).sha == second
    now += 60
    assert client.repo_info(run).sha == second


def test_silence_ends_with_the_clients_timeout_or_a_closed_connection(hub, client, run):
    hub.faults.hang_seconds = 1.0
    hub.faults.once("hang", times=2)
    with pytest.raises(httpx.ReadTimeout):
        client.repo_info(run, timeout=0.1)
    with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
        client.repo_info(run)
    assert client.repo_info(run).id == run


def test_a_cut_answer_of_the_api_is_an_error(hub, client, run):
    hub.faults.once("cut", f"/api/models/{run}$")
    with pytest.raises(httpx.RemoteProtocolError):
        client.repo_info(run)


def test_creation_that_conflicts_is_repeated_until_it_succeeds(hub, client):
    hub.faults.once("create-busy", times=3)
    client.create_repo("lab/new")
    assert hub.log.count("/repos/create") == 4


def test_chance_is_seeded_per_user_and_keeps_to_its_requests(hub, hub_client):
    hub.repo("lab/run")
    clients = [hub_client(hub.user(name)) for name in ("ann", "bob")]
    hub.faults.configure(rate=0.3, kinds=("500", "503", "409"), match="GET .*/refs", seed=5)

    def statuses(order):
        hub.log.clear()
        for client in order:
            for read in (client.list_repo_refs, client.repo_info):
                with contextlib.suppress(HfHubHTTPError):  # the log has it
                    read("lab/run")
        return {user: [entry.status for entry in hub.log.entries(user=user)] for user in ("ann", "bob")}

    first = statuses(clients * 20)
    failed = [entry for entry in hub.log.entries() if entry.fault]
    assert 4 <= len(failed) <= 20  # of 40, at 0.3
    assert all(entry.path.endswith("/refs") for entry in failed)
    assert {entry.status for entry in failed} == {500, 503}
    hub.faults.clear()
    assert hub.faults.rate == 0
    hub.faults.configure(rate=0.3, kinds=("500", "503", "409"), match="GET .*/refs", seed=5)
    assert statuses([clients[0]] * 20 + [clients[1]] * 20) == first
    assert first["ann"] != first["bob"]


def test_rules_choose_by_user_and_method_and_wear_out(hub, hub_client):
    hub.repo("lab/run")
    ann, bob = (hub_client(hub.user(name)) for name in ("ann", "bob"))
    hub.faults.once("500", "/refs", user="bob", times=2)
    ann.list_repo_refs("lab/run")
    for _ in range(2):
        refused(500, bob.list_repo_refs, "lab/run")
    bob.list_repo_refs("lab/run")


def test_unknown_faults_are_named(hub):
    with pytest.raises(ValueError, match=r"unknown fault 'explode'.*stale"):
        hub.faults.once("explode")
    with pytest.raises(ValueError, match="unknown fault 'explode'"):
        hub.faults.configure(kinds=("explode",))
    with pytest.raises(ValueError, match="unknown fault setting 'speed'"):
        hub.faults.configure(speed=3)
