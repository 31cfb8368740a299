"""The real huggingface_hub client against the loopback Hub: every call a mailbox makes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    ModelCard,
    RepoFile,
    RepoFolder,
    get_hf_file_metadata,
    get_session,
    hf_hub_url,
)
from huggingface_hub.errors import (
    BadRequestError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tests.loopback_hub.conftest import push

BINARY = bytes(range(256)) * 80  # 20 kB that go to LFS
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


def test_whoami_names_user_organisations_and_token_role(hub, hub_client):
    told = hub_client(hub.user("eve", "read", org="lab")).whoami()
    assert (told["name"], told["auth"]["accessToken"]["role"]) == ("eve", "read")
    assert [(org["name"], org["roleInOrg"]) for org in told["orgs"]] == [("lab", "read")]
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        hub_client("hf_unknown").whoami()


def test_creating_what_exists_is_a_conflict_that_names_it(hub, client):
    url = client.create_repo("lab/run", private=True)
    assert url.repo_id == "lab/run"
    assert client.create_repo("lab/run", exist_ok=True) == url
    with pytest.raises(HfHubHTTPError, match="already created"):
        client.create_repo("lab/run")
    assert client.create_repo("mine").repo_id == "ann/mine"
    assert hub.repos() == ["lab/run", "ann/mine"]


def test_deleting_and_settings(hub, client, run):
    client.update_repo_settings(run, private=True)
    assert client.repo_info(run).private
    client.delete_repo(run)
    assert not client.repo_exists(run)
    with pytest.raises(RepositoryNotFoundError):
        client.delete_repo(run)
    client.delete_repo(run, missing_ok=True)


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_what_is_pushed_is_described_and_comes_back(hub, client, kind):
    client.create_repo("lab/run", repo_type=kind)
    operations = [CommitOperationAdd("rounds/1.safetensors", BINARY), CommitOperationAdd("note.txt", b"hello")]
    made = client.create_commit("lab/run", operations, commit_message="push", repo_type=kind)

    info = client.repo_info("lab/run", repo_type=kind, files_metadata=True)
    assert info.sha == made.oid == hub.head("lab/run", type=kind)
    files = {sibling.rfilename: sibling for sibling in info.siblings}
    assert files["rounds/1.safetensors"].lfs.sha256 == hashlib.sha256(BINARY).hexdigest()
    assert (files["note.txt"].size, files["note.txt"].lfs) == (5, None)
    for path, content in (("rounds/1.safetensors", BINARY), ("note.txt", b"hello")):
        assert hub.read("lab/run", path, type=kind) == content
        assert Path(client.hf_hub_download("lab/run", path, repo_type=kind)).read_bytes() == content
    folder = Path(client.snapshot_download("lab/run", repo_type=kind, revision=made.oid))
    assert (folder / "rounds" / "1.safetensors").read_bytes() == BINARY


def test_info_of_a_revision_and_of_chosen_properties(client, run):
    first = push(client, run, a=b"1").oid
    push(client, run, a=b"2")
    assert client.repo_info(run, revision=first).sha == first
    with pytest.raises(RevisionNotFoundError):
        client.repo_info(run, revision="nowhere")
    chosen = client.model_info(run, expand=["sha", "private"])
    assert chosen.private is False
    assert chosen.siblings is None


def test_lists_of_repositories(hub, client):
    for name in ("run", "run-c1", "run-c2", "other"):
        client.create_repo(f"lab/{name}", private=name == "run-c2")
    hub.repo("somebody/run")
    assert {model.id for model in client.list_models(author="lab")} == set(hub.repos()) - {"somebody/run"}
    assert [model.id for model in client.list_models(author="lab", search="run-c")] == ["lab/run-c2", "lab/run-c1"]
    assert len(list(client.list_models(limit=2))) == 2
    hub.configure(list_page=2)
    before = hub.log.count("/api/models\\?")
    assert len(list(client.list_models(author="lab"))) == 4
    assert hub.log.count("/api/models\\?") == before + 2


def test_trees_are_paged_and_count_folders(hub, client, run):
    operations = [CommitOperationAdd(f"rounds/{n}/{name}.bin", b"x") for n in (1, 2) for name in "ab"]
    client.create_commit(run, operations, commit_message="push")
    hub.configure(tree_page=3)
    top = list(client.list_repo_tree(run))
    assert [(type(item), item.path) for item in top] == [(RepoFolder, "rounds"), (RepoFile, ".gitattributes")]
    everything = list(client.list_repo_tree(run, recursive=True))
    assert sum(isinstance(item, RepoFolder) for item in everything) == 3
    assert hub.log.count("/tree/main.*recursive=true") == 3  # 8 items
    inside = list(client.list_repo_tree(run, "rounds/2", expand=True))
    assert [item.path for item in inside] == ["rounds/2/a.bin", "rounds/2/b.bin"]
    assert inside[0].last_commit.title == "push"
    assert inside[0].lfs.sha256 == hashlib.sha256(b"x").hexdigest()
    with pytest.raises(RemoteEntryNotFoundError):
        list(client.list_repo_tree(run, "nowhere"))


def test_paths_info_tells_the_last_commit_that_changed_each_path(client, run):
    first = push(client, run, **{"a/x": b"1", "b/y": b"1"}).oid
    second = push(client, run, **{"b/y": b"2"}).oid
    found = {item.path: item for item in client.get_paths_info(run, ["a", "b/y", "a/x", "missing"], expand=True)}
    assert set(found) == {"a", "b/y", "a/x"}
    assert {path: item.last_commit.oid for path, item in found.items()} == {"a": first, "a/x": first, "b/y": second}


def test_commits_have_parents_and_are_paged(hub, client, run):
    oids = [push(client, run, a=str(n).encode()).oid for n in range(4)]
    hub.configure(commits_page=2)
    listed = client.list_repo_commits(run)
    assert [commit.commit_id for commit in listed[:-1]] == oids[::-1]
    assert [commit.authors for commit in listed] == [["ann"]] * 5
    parents = [commit["parents"] for commit in hub.commits(run)]
    assert parents == [[commit.commit_id] for commit in listed[1:]] + [[]]


def test_unchanged_files_make_no_commit(hub, client, run):
    operation = {"a.bin": BINARY, "b": b"text"}
    made = push(client, run, **operation)
    assert push(client, run, **operation).oid == made.oid
    assert len(hub.commits(run)) == 2


@pytest.mark.parametrize(
    ("path", "content", "large"),
    [
        ("a.safetensors", b"text", True),
        ("a.png", b"\x89PNG", True),
        ("nul", b"\0", True),
        ("latin", b"\xe9t\xe9 ", True),
        ("a.json", b"{}", False),
        ("sample ends within a letter", ("x" + "é" * 400).encode(), False),
        ("empty.bin", b"", False),
    ],
)
def test_what_goes_to_lfs(client, run, path, content, large):
    push(client, run, **{path: content})
    (item,) = client.get_paths_info(run, [path])
    assert (item.lfs is not None) == large


def test_files_above_ten_megabytes_go_to_lfs_and_above_a_limit_in_parts(hub, client, run):
    hub.configure(lfs_above=1000, multipart_above=10_000, part_size=7_000)
    push(client, run, short=b"x" * 2_000, long=b"y" * 20_001)
    assert {item.path for item in client.get_paths_info(run, ["short", "long"]) if item.lfs} == {"short", "long"}
    assert hub.read(run, "long") == b"y" * 20_001
    assert hub.log.count("^/parts/", method="PUT") == 3


def test_a_push_is_five_calls_and_a_pull_two(hub, client, run):
    hub.log.clear()
    push(client, run, **{"a.safetensors": BINARY})
    pushed = [(entry.origin, entry.method, entry.path.split("?")[0].rsplit("/", 2)[-2]) for entry in hub.log.entries()]
    assert [method for _, method, _ in pushed] == ["POST", "POST", "PUT", "POST", "POST"]
    assert [origin for origin, _, _ in pushed] == ["hub", "hub", "storage", "hub", "hub"]
    hub.log.clear()
    client.hf_hub_download(run, "a.safetensors")
    assert [(entry.origin, entry.method) for entry in hub.log.entries()] == [("hub", "HEAD"), ("storage", "GET")]
    assert hub.log.per_user() == {"ann": 2}


def test_one_head_tells_commit_sha256_and_size(hub, client, run):
    made = push(client, run, **{"rounds/1.safetensors": BINARY})
    url = hf_hub_url(run, "rounds/1.safetensors", endpoint=hub.endpoint)
    found = get_hf_file_metadata(url, token=client.token)
    assert (found.commit_hash, found.etag, found.size) == (made.oid, hashlib.sha256(BINARY).hexdigest(), len(BINARY))
    with pytest.raises(RemoteEntryNotFoundError) as missing:
        get_hf_file_metadata(hf_hub_url(run, "rounds/2.safetensors", endpoint=hub.endpoint), token=client.token)
    assert missing.value.response.headers["X-Repo-Commit"] == made.oid


def test_deletions(hub, client, run):
    push(client, run, **{"a": b"1", "rounds/1": b"1", "rounds/2": b"2", "rounds2": b"3"})
    client.delete_file("a", run)
    client.delete_folder("rounds", run)
    assert hub.files(run) == ["rounds2"]
    with pytest.raises(RemoteEntryNotFoundError, match="A file with this name doesn't exist"):
        client.delete_file("a", run)
    with pytest.raises(RemoteEntryNotFoundError):
        client.delete_folder("rounds", run)
    replaced = [CommitOperationDelete("rounds2"), CommitOperationAdd("rounds2", b"4")]
    client.create_commit(run, replaced, commit_message="replace")
    assert hub.read(run, "rounds2") == b"4"


def test_a_refused_commit_changes_nothing(hub, client, run):
    push(client, run, a=b"1")
    before = hub.head(run)
    both = [CommitOperationAdd("b", b"2"), CommitOperationDelete("missing")]
    with pytest.raises(RemoteEntryNotFoundError):
        client.create_commit(run, both, commit_message="half")
    with pytest.raises(BadRequestError, match="is a file"):
        push(client, run, **{"a/b": b"2"})
    lost = CommitOperationAdd("lost.bin", BINARY)
    lost._is_uploaded, lost._upload_mode, lost._should_ignore = True, "lfs", False
    with pytest.raises(BadRequestError, match="LFS pointer pointed to a file that does not exist"):
        client.create_commit(run, [lost], commit_message="pointer only")
    assert hub.head(run) == before


def test_a_parent_that_is_not_the_head_is_refused(hub, client, run):
    first = push(client, run, a=b"1").oid
    client.upload_file(path_or_fileobj=b"2", path_in_repo="a", repo_id=run, parent_commit=first)
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as refused:
        client.upload_file(path_or_fileobj=b"3", path_in_repo="a", repo_id=run, parent_commit=first)
    assert refused.value.response.status_code == 412
    assert hub.read(run, "a") == b"2"


def test_squash_leaves_one_commit_and_what_tags_hold(hub, client, run):
    first = push(client, run, a=b"1").oid
    client.create_tag(run, tag="kept", revision=first)
    second = push(client, run, a=b"2").oid
    push(client, run, b=b"3")
    client.super_squash_history(run, commit_message="squashed")
    assert [commit["title"] for commit in hub.commits(run)] == ["squashed"]
    assert hub.files(run) == ["a", "b"]
    assert hub.read(run, "a", revision=first) == hub.read(run, "a", revision="kept") == b"1"
    with pytest.raises(RevisionNotFoundError):
        client.repo_info(run, revision=second)
    with pytest.raises(HfHubHTTPError, match="A commit has happened since"):
        client.upload_file(path_or_fileobj=b"4", path_in_repo="a", repo_id=run, parent_commit=second)


def test_branches_and_tags(hub, client, run):
    first = push(client, run, a=b"1").oid
    push(client, run, a=b"2")
    client.create_branch(run, branch="side/way", revision=first)
    client.create_branch(run, branch="side/way", exist_ok=True)
    client.create_tag(run, tag="round-000001", tag_message="one")
    with pytest.raises(HfHubHTTPError, match="Reference already exists"):
        client.create_branch(run, branch="side/way")
    with pytest.raises(HfHubHTTPError, match="Reference already exists"):
        client.create_tag(run, tag="round-000001")
    client.upload_file(path_or_fileobj=b"3", path_in_repo="a", repo_id=run, revision="side/way")
    assert (hub.read(run, "a", revision="side/way"), hub.read(run, "a", revision="round-000001")) == (b"3", b"2")
    refs = client.list_repo_refs(run)
    assert [ref.name for ref in refs.branches] == ["main", "side/way"]
    assert [(ref.ref, ref.target_commit) for ref in refs.tags] == [("refs/tags/round-000001", hub.head(run))]
    client.delete_branch(run, branch="side/way")
    client.delete_tag(run, tag="round-000001")
    assert list(hub.refs(run)) == ["refs/heads/main"]
    with pytest.raises(RevisionNotFoundError):
        client.delete_tag(run, tag="round-000001")


def test_cards_are_checked_before_anything_is_uploaded(hub, client, run):
    ModelCard("---\nlicense: mit\ntags: [fed]\n---\n# A card\n").push_to_hub(run, token=client.token)
    assert client.model_info(run).card_data.license == "mit"
    assert client.model_info(run).tags == ["fed"]
    for bad in ("---\ntags: one\n---\n", "---\n- a\n---\n", "---\na: [\n---\n"):
        with pytest.raises(ValueError, match="Invalid metadata"):
            push(client, run, **{"README.md": bad.encode(), "a.bin": BINARY})
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        push(client, run, **{"README.md": b"# No metadata\n"})
    assert hub.log.count("objects/batch") == 0


def test_ranges(hub, client, run):
    push(client, run, **{"a.bin": BINARY, "a.txt": b"0123456789"})
    for path, size in (("a.bin", len(BINARY)), ("a.txt", 10)):
        whole = hub.read(run, path)
        url = hf_hub_url(run, path, endpoint=hub.endpoint)
        for asked, expected in (("3-5", whole[3:6]), ("4-", whole[4:]), ("-2", whole[-2:])):
            answer = get_session().get(url, headers={"Range": f"bytes={asked}"})
            assert (answer.status_code, answer.content) == (206, expected)
            assert answer.headers["Content-Range"].endswith(f"/{size}")
        assert get_session().get(url, headers={"Range": f"bytes={size}-"}).status_code == 416
