"""A hostile mailbox names repos for a client to write to, to squash, or to show to everybody."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator

import pytest
from huggingface_hub import CommitOperationAdd, HfApi, ModelInfo
from huggingface_hub.utils import httpx

from fedfstq_hf.errors import ConfigError, MailboxError
from fedfstq_hf.federation import adapter_file
from fedfstq_hf.federation.control import Control, Enrolment, change_control, enrol
from fedfstq_hf.federation.mailbox.folder import FolderMailbox
from fedfstq_hf.federation.mailbox.hub import writing
from fedfstq_hf.federation.mailbox.hub.mailbox import HubMailbox
from fedfstq_hf.federation.mailbox.open import open_mailbox
from tests.federation.light import SCHEMA, LightClient, found_in
from tests.loopback_hub.federation import HubFederation
from tests.loopback_hub.loopback import LoopbackHub

PRECIOUS = "victim/precious-model"


@pytest.fixture
def run(hub_here: LoopbackHub) -> HubFederation:
    return HubFederation(hub_here, "own")


class Trap:
    """`evil/run` of mallory, whom the client `c` of vic, a member of both organisations, follows."""

    def __init__(self, hub: LoopbackHub, layout: str = "own", control: Control | None = None) -> None:
        self.hub = hub
        self.evil = hub.user("mallory", "write", org="evil")
        self.victim = hub.user("vic", "write", org="victim")
        hub.user("vic", "write", org="evil")
        hub.repo(PRECIOUS, private=True, creator="vic")
        for version in range(3):
            hub.write(PRECIOUS, {f"v{version}.txt": b"x"}, message=f"Version {version}")
        box = HubMailbox("hf://evil/run", create=True, layout=layout, token=self.evil, patience=5)
        found_in(box, control=control, min_clients=1, rounds=500)
        self.before = hub.commits(PRECIOUS)
        hub.log.clear()

    def mailbox(self, **options: object) -> HubMailbox:
        return HubMailbox("hf://evil/run", token=self.victim, patience=5, **options)

    def assert_untouched(self) -> None:
        assert self.hub.commits(PRECIOUS) == self.before
        assert all(entry.method in ("GET", "HEAD") for entry in self.hub.log.entries(user="vic"))


def redirected(hub: LoopbackHub) -> Trap:
    return Trap(hub, control=Control(clients={"c": Enrolment(repo=PRECIOUS)}))


@pytest.mark.parametrize(
    "act",
    [
        lambda box: LightClient(box, "c", None).step(),
        lambda box: box.post_update(200, "c", b"message"),
        lambda box: box.post_metric(0, "test", {"eval_loss": 1.0}, client_id="c"),
        lambda box: box.post_attachment("c", "saliency.safetensors", b"x"),
        lambda box: box.check_client("c"),
    ],
    ids=["round", "update", "metric", "attachment", "joining"],
)
def test_a_repo_that_only_the_control_file_names_is_never_written(
    hub_here: LoopbackHub, act: Callable[[HubMailbox], object]
) -> None:
    trap = redirected(hub_here)
    with pytest.raises(MailboxError, match=r"from victim/precious-model, but this client writes to evil/run-c.*repo:"):
        act(trap.mailbox())
    trap.assert_untouched()
    assert "evil/run-c" not in hub_here.repos()


def test_the_clients_own_settings_decide(run: HubFederation) -> None:
    change_control(run.mailbox(run.owner), enrol(["a"], repo="org/elsewhere"))
    mailbox = run.mailbox(run.tokens["a"], client_repo="org/elsewhere")
    mailbox.post_update(0, "a", b"message")
    assert run.hub.files("org/elsewhere") == [".fedfstq.json", "rounds/000000.safetensors"]
    assert [ref.client_id for ref in run.mailbox(run.owner).list_updates(0, ["a"])] == ["a"]
    with pytest.raises(MailboxError, match=r"from org/run-b, but this client writes to org/other.*enrol .* --repo"):
        run.mailbox(run.tokens["b"], client_repo="org/other").post_update(0, "b", b"message")
    assert "org/other" not in run.hub.repos()


def test_a_repo_is_named_by_its_organisation(run: HubFederation, tmp_path: object) -> None:
    for bad in ("run-a", "org/a/b", "../x/y", "org/x y", ""):
        with pytest.raises(ConfigError, match="ORG/NAME"):
            run.mailbox(run.owner, client_repo=bad)
        with pytest.raises(ConfigError, match="ORG/NAME"):
            Enrolment(repo=bad)
    with pytest.raises(MailboxError, match="ORG/NAME"):
        Control.from_json(b'{"format": 1, "clients": {"a": {"repo": "../x/y"}}, "paused": null}')
    with pytest.raises(ConfigError, match="folder"):
        open_mailbox(str(tmp_path), client_repo="org/x")
    FolderMailbox(str(tmp_path)).check_client("a")


def test_a_repo_with_somebody_elses_files_is_not_written(hub_here: LoopbackHub) -> None:
    """As where the address is chosen so that ORG/RUN-CLIENT is a repo that the client has."""
    trap = Trap(hub_here)
    hub_here.repo("evil/run-c", private=True, creator="vic")
    head = hub_here.write("evil/run-c", {"weights.bin": b"mine"})
    with pytest.raises(MailboxError, match=r"evil/run-c is not this client's: it holds weights.bin"):
        trap.mailbox().post_update(0, "c", b"message")
    assert hub_here.head("evil/run-c") == head
    trap.assert_untouched()
    trap.mailbox(client_repo="evil/run-c").post_update(0, "c", b"message")  # now it was named
    assert "rounds/000000.safetensors" in hub_here.files("evil/run-c")


def test_an_empty_repo_that_somebody_made_for_the_client_is_taken(run: HubFederation) -> None:
    run.hub.repo("org/run-a", private=True, creator="user-a")
    run.mailbox(run.tokens["a"]).post_update(0, "a", b"message")
    assert run.hub.files("org/run-a") == [".fedfstq.json", "rounds/000000.safetensors"]


def test_a_repo_of_another_client_or_federation_is_not_written(run: HubFederation) -> None:
    run.mailbox(run.tokens["a"]).post_update(0, "a", b"message")
    change_control(run.mailbox(run.owner), enrol(["a"]))
    change_control(run.mailbox(run.owner), enrol(["b"], repo="org/run-a"))
    owner = run.mailbox(run.owner, client_repo="org/run-a")  # may write every repo of the organisation
    with pytest.raises(MailboxError, match=r"org/run-a belongs to client a of hf://org/run; this is client b"):
        owner.post_update(0, "b", b"message")
    marker = json.loads(run.hub.read("org/run-a", ".fedfstq.json"))
    assert marker == {"format": 1, "federation": "org/run", "client_id": "a"}
    run.hub.write("org/run-a", {".fedfstq.json": json.dumps({**marker, "federation": "org/ru"}).encode()})
    with pytest.raises(MailboxError, match=r"org/run-a belongs to client a of hf://org/ru;"):
        run.mailbox(run.tokens["a"]).post_update(1, "a", b"message")
    run.hub.write("org/run-a", {".fedfstq.json": b"[" * 900})
    with pytest.raises(MailboxError, match=r".fedfstq.json of org/run-a cannot be read"):
        run.mailbox(run.tokens["a"]).post_update(1, "a", b"message")


# -- squashing ---------------------------------------------------------------------------------------------------------


def squashes(hub: LoopbackHub) -> int:
    return len(hub.log.entries(path="super-squash"))


def test_own_messages_are_counted_not_the_mailboxs_rounds(run: HubFederation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "SQUASH_EVERY", 3)
    run.mailbox(run.tokens["a"]).post_update(200, "a", b"first")
    run.mailbox(run.tokens["a"]).post_update(400, "a", b"second")
    run.mailbox(run.tokens["a"]).post_update(400, "a", b"second, refined", refinement=True)
    assert squashes(run.hub) == 0
    run.mailbox(run.tokens["a"]).post_update(401, "a", b"fourth")
    titles = [commit["title"] for commit in run.hub.commits("org/run-a")]
    assert titles == ["Round 401", "Earlier messages"]
    for round in range(402, 405):
        run.mailbox(run.tokens["a"]).post_update(round, "a", b"again")
    assert squashes(run.hub) == 2
    titles = [commit["title"] for commit in run.hub.commits("org/run-a")]
    assert titles == ["Round 404", "Earlier messages"]
    assert len(run.hub.files("org/run-a")) == 8


@pytest.mark.parametrize(
    ("files", "message", "author", "why"),
    [
        ({"notes.txt": b"mine"}, "Notes", "user-a", "it holds notes.txt"),
        ({"rounds/000009.safetensors": b"x"}, "Round 9", "owner", "owner committed Round 9"),
        ({"rounds/000009.safetensors": b"x"}, "Thesis, chapter 9", "user-a", "it has the commit Thesis, chapter 9"),
    ],
)
def test_no_history_is_squashed_that_somebody_else_is_part_of(
    run: HubFederation,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    files: dict[str, bytes],
    message: str,
    author: str,
    why: str,
) -> None:
    monkeypatch.setattr(writing, "SQUASH_EVERY", 1)
    client = run.mailbox(run.tokens["a"])
    client.post_update(0, "a", b"message")
    run.hub.write("org/run-a", files, message=message, author=author)
    for round in (1, 2):
        client.post_update(round, "a", b"message")
    assert squashes(run.hub) == 0
    told = [record.message for record in caplog.records if "kept as it is" in record.message]
    assert told == [f"The history of org/run-a is kept as it is: {why}."]
    assert "rounds/000002.safetensors" in run.hub.files("org/run-a")


def test_a_named_repo_that_this_package_did_not_make_is_not_squashed(
    run: HubFederation, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Even where its files and titles look like messages."""
    monkeypatch.setattr(writing, "SQUASH_EVERY", 1)
    run.hub.repo("org/mine", private=True, creator="user-a")
    run.hub.write("org/mine", {"rounds/000001.safetensors": b"x"}, message="Round 1", author="user-a")
    change_control(run.mailbox(run.owner), enrol(["a"], repo="org/mine"))
    run.mailbox(run.tokens["a"], client_repo="org/mine").post_update(7, "a", b"message")
    assert squashes(run.hub) == 0
    assert "it was not made by this package" in caplog.text


@pytest.mark.parametrize("change", ["files", "history", "marker"])
def test_a_coordinator_deletes_and_squashes_only_what_the_package_wrote(
    hub_here: LoopbackHub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, change: str
) -> None:
    monkeypatch.setattr("fedfstq_hf.federation.mailbox.hub.layouts._SQUASH_COMMITS", 1)
    run = HubFederation(hub_here, "shared")
    client, owner = run.mailbox(run.tokens["a"]), run.mailbox(run.owner)
    for round in (0, 1, 9):
        client.post_update(round, "a", b"message")
    if change == "files":
        run.hub.write("org/run-mailbox", {"rounds/000000/notes.txt": b"x"}, message="Notes", author="user-b")
    elif change == "history":
        run.hub.write("org/run-mailbox", {"rounds/000001/deltas/b.safetensors": b"x"}, "By hand", author="user-b")
    else:
        run.hub.write("org/run-mailbox", {".fedfstq.json": b"{}"})
    owner.housekeep(10, clients=1, keep_rounds=2, tag=False)
    left = [path for path in run.hub.files("org/run-mailbox") if path.startswith("rounds/00000")]
    kept = {"files": {"rounds/000000/notes.txt", "rounds/000000/deltas/a.safetensors"}, "history": set()}
    every = {f"rounds/{round:06d}/deltas/a.safetensors" for round in (0, 1, 9)}
    assert set(left) == kept.get(change, every) | {"rounds/000009/deltas/a.safetensors"}
    assert squashes(run.hub) == 0
    told = "org/run-mailbox is not tidied" if change == "marker" else "history of org/run-mailbox is kept as it is"
    assert told in caplog.text


def test_a_shared_repo_that_only_the_package_wrote_is_squashed(
    hub_here: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedfstq_hf.federation.mailbox.hub.layouts._SQUASH_COMMITS", 1)
    run = HubFederation(hub_here, "shared")
    for name in "ab":
        run.mailbox(run.tokens[name]).post_update(0, name, b"message of " + name.encode())
        run.mailbox(run.tokens[name]).post_metric(0, "test", {"eval_loss": 1.0}, client_id=name)
    run.mailbox(run.owner).housekeep(10, clients=1, keep_rounds=2, tag=False)
    assert [commit["title"] for commit in run.hub.commits("org/run-mailbox")] == ["Earlier messages"]


# -- who reads what is written -----------------------------------------------------------------------------------------


def test_a_public_repo_gets_no_messages(run: HubFederation) -> None:
    client = run.mailbox(run.tokens["a"])
    client.post_update(0, "a", b"message")
    HfApi(token=run.tokens["a"]).update_repo_settings("org/run-a", private=False)
    for act in (lambda: client.post_update(1, "a", b"message"), lambda: client.check_client("a")):
        with pytest.raises(MailboxError, match=r"org/run-a is public.*hf repos settings org/run-a --private"):
            act()
    named = run.mailbox(run.tokens["a"], client_repo="org/run-a")
    with pytest.raises(MailboxError, match="is public"):
        named.post_metric(0, "test", {"eval_loss": 1.0}, client_id="a")
    assert run.hub.files("org/run-a") == [".fedfstq.json", "rounds/000000.safetensors"]


def test_a_repo_that_leads_elsewhere_gets_no_messages(run: HubFederation, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub answers for a renamed repo under its old name."""
    client = run.mailbox(run.tokens["a"])
    client.post_update(0, "a", b"message")
    asked = HfApi.model_info
    monkeypatch.setattr(HfApi, "model_info", lambda api, repo: replaced(asked(api, repo), id="org/elsewhere"))
    with pytest.raises(MailboxError, match=r"org/run-a was renamed.* would go to org/elsewhere"):
        client.post_update(1, "a", b"message")
    assert "rounds/000001.safetensors" not in run.hub.files("org/run-a")


def replaced(info: ModelInfo, id: str) -> ModelInfo:
    info.id = id
    return info


def test_a_clients_repo_is_made_private_whatever_it_is_told(run: HubFederation) -> None:
    run.mailbox(run.tokens["a"], private=False).post_update(0, "a", b"message")
    assert HfApi(token=run.owner).model_info("org/run-a").private


@pytest.mark.parametrize("layout", ["shared", "pull-request"])
def test_a_public_mailbox_gets_only_the_messages_of_who_named_it(hub_here: LoopbackHub, layout: str) -> None:
    run = HubFederation(hub_here, layout)
    HfApi(token=run.owner).update_repo_settings("org/run-mailbox", private=False)
    for act in (
        lambda: run.mailbox(run.tokens["a"]).check_client("a"),
        lambda: run.mailbox(run.tokens["a"]).post_update(0, "a", b"message"),
    ):
        with pytest.raises(MailboxError, match=r"is public.*say repo: org/run-mailbox"):
            act()
    run.mailbox(run.tokens["a"], client_repo="org/run-mailbox").post_update(0, "a", b"message")
    assert [ref.client_id for ref in run.mailbox(run.owner).list_updates(0)] == ["a"]
    with pytest.raises(ConfigError, match=r"writes to org/mine, but all clients .* write to org/run-mailbox"):
        run.mailbox(run.tokens["b"], client_repo="org/mine").post_update(0, "b", b"message")


@pytest.mark.parametrize("layout", ["shared", "pull-request"])
def test_a_repo_that_no_federation_was_founded_with_is_no_mailbox(hub_here: LoopbackHub, layout: str) -> None:
    """Who may write only evil/run says that its clients write to evil/run-mailbox, which is somebody else's."""
    trap = Trap(hub_here)
    hub_here.repo("evil/run-mailbox", private=True, creator="vic")
    head = hub_here.write("evil/run-mailbox", {"inbox.txt": b"mine"})
    data = json.dumps({"format": 1, "layout": layout}).encode()
    hub_here.write("evil/run", {"fedfstq/mailbox.json": data})
    with pytest.raises(MailboxError, match=r"evil/run-mailbox was not made for hf://evil/run"):
        trap.mailbox().post_update(0, "c", b"message")
    assert hub_here.head("evil/run-mailbox") == head
    trap.assert_untouched()


def test_founding_leaves_a_repo_alone_that_is_no_mailbox(hub_here: LoopbackHub) -> None:
    hub_here.org("org")
    hub_here.repo("org/run-mailbox", private=True)
    head = hub_here.write("org/run-mailbox", {"inbox.txt": b"mine"})
    with pytest.raises(MailboxError, match="org/run-mailbox already holds something else"):
        HubFederation(hub_here, "shared", org=False)
    assert hub_here.head("org/run-mailbox") == head


def test_a_pull_request_of_somebody_else_is_not_written(hub_here: LoopbackHub) -> None:
    run = HubFederation(hub_here, "pull-request")
    squatter = hub_here.user("squatter", "write", org="org", member="read")
    HfApi(token=squatter).create_commit(
        "org/run-mailbox", [CommitOperationAdd("x", b"x")], commit_message="Updates of client a", create_pr=True
    )
    writer = hub_here.user("strong", "write", org="org")  # may write to every pull request
    with pytest.raises(MailboxError, match=r"account squatter, but this token is of strong.*--account strong"):
        run.mailbox(writer).post_update(0, "a", b"message")
    assert hub_here.files("org/run-mailbox", "refs/pr/1") == [".fedfstq.json", "x"]
    change_control(run.mailbox(run.owner), enrol(["a"], account="user-a"))
    with pytest.raises(MailboxError, match=r"account user-a, but this token is of strong"):
        run.mailbox(writer).post_update(0, "a", b"message")
    run.mailbox(run.tokens["a"]).post_update(0, "a", b"message")
    assert hub_here.files("org/run-mailbox", "refs/pr/2") == [".fedfstq.json", "rounds/000000.safetensors"]


# -- what is read of a hostile mailbox ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "size", "read"),
    [
        ("fedfstq/mailbox.json", 2000, lambda box: box.check_client("a")),
        ("fedfstq/control.json", 4 * 10**6 + 1, lambda box: box.read_control()),
        ("fedfstq/round.json", 16 * 10**6 + 1, lambda box: box.head()),
        ("fedfstq/spec.json", 2**16 + 1, lambda box: box.read(0, "spec.json")),
        ("adapter_config.json", 10**6 + 1, lambda box: box.read(0, "adapter_config.json")),
    ],
)
def test_a_file_larger_than_any_is_not_downloaded(
    run: HubFederation,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    size: int,
    read: Callable[[HubMailbox], object],
) -> None:
    run.hub.write("org/run", {path: b" " * size})
    downloaded, iterate = [0], httpx.Response.iter_bytes

    def counted(response: httpx.Response, *args: int) -> Iterator[bytes]:
        for chunk in iterate(response, *args):
            downloaded[0] += len(chunk) if path in str(response.url) else 0
            yield chunk

    monkeypatch.setattr(httpx.Response, "iter_bytes", counted)
    with pytest.raises(MailboxError, match=rf"{path} of org/run is too large.*{size} bytes"):
        read(run.mailbox(run.tokens["a"]))
    assert downloaded[0] < 1000  # the Hub's redirects


def test_an_adapter_larger_than_its_schema_is_not_downloaded(run: HubFederation) -> None:
    client = run.client("a")
    size = adapter_file.most_bytes(SCHEMA) + 1
    assert size < 10_000  # 192 parameters
    run.hub.write("org/run", {"adapter_model.safetensors": bytes(size)})
    with pytest.raises(MailboxError, match=rf"adapter_model.safetensors of org/run is too large. It has {size} bytes"):
        client.step()


def test_deep_json_is_refused_in_every_file_of_the_mailbox(run: HubFederation) -> None:
    deep = b'{"format": 1, "layout": "own", "round": 0, "clients": ' + b"[" * 50_000 + b"]" * 50_000 + b"}"
    run.hub.write("org/run", {"fedfstq/control.json": deep})
    with pytest.raises(MailboxError, match="control file cannot be read"):
        run.client("a").step()
    run.hub.write("org/run", {"fedfstq/mailbox.json": deep[:900]})
    with pytest.raises(MailboxError, match="layout file cannot be read"):
        run.mailbox(run.tokens["a"]).list_updates(0)
    run.hub.write("org/run", {"fedfstq/round.json": deep})
    with pytest.raises(MailboxError, match="round record of hf://org/run cannot be read"):
        run.mailbox(run.tokens["a"]).head()


def test_damaged_metrics_of_the_mailbox_are_left_out(run: HubFederation, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    reader = run.mailbox(run.tokens["a"])
    reader.head()
    run.hub.write("org/run", {"fedfstq/metrics.json": b'{"0": {"test": {"eval_loss": NaN}}}'})
    reader.head()
    assert reader.read_metrics() == {}
    assert "metrics of hf://org/run" in caplog.text
