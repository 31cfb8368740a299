"""Pull requests and discussions on the loopback Hub, by the real client."""

from __future__ import annotations

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete
from huggingface_hub.errors import BadRequestError, HfHubHTTPError

from tests.loopback_hub.conftest import push

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def volunteer(hub, hub_client, run):
    """A stranger who may read lab/run."""
    return hub_client(hub.user("volunteer"))


def propose(client, repo, **files):
    operations = [CommitOperationAdd(path, content) for path, content in files.items()]
    return client.create_commit(repo, operations, commit_message="update", create_pr=True)


def test_one_long_lived_pull_request_per_client(hub, hub_client, client, run, volunteer):
    made = propose(volunteer, run, **{"rounds/1.safetensors": b"1" * 1000})
    assert (made.pr_num, made.pr_revision) == (1, "refs/pr/1")
    volunteer.upload_file(
        path_or_fileobj=b"2" * 1000, path_in_repo="rounds/2.safetensors", repo_id=run, revision="refs/pr/1"
    )
    assert hub.files(run) == []
    assert hub.files(run, "refs/pr/1") == ["rounds/1.safetensors", "rounds/2.safetensors"]
    refs = client.list_repo_refs(run, include_pull_requests=True)
    assert [(ref.ref, ref.target_commit) for ref in refs.pull_requests] == [("refs/pr/1", hub.head(run, "refs/pr/1"))]
    with pytest.raises(HfHubHTTPError, match="403"):
        hub_client(hub.user("other")).upload_file(
            path_or_fileobj=b"3", path_in_repo="rounds/1.safetensors", repo_id=run, revision="refs/pr/1"
        )
    kinds = [(event.type, event.author) for event in client.get_discussion_details(run, 1).events]
    assert kinds == [("comment", "volunteer"), ("commit", "volunteer"), ("commit", "volunteer")]


def test_merging_joins_both_sides(hub, client, run, volunteer):
    push(client, run, kept=b"1", changed=b"1", deleted=b"1")
    operations = [
        CommitOperationAdd("changed", b"2"),
        CommitOperationAdd("new", b"2"),
        CommitOperationDelete("deleted"),
    ]
    volunteer.create_commit(run, operations, commit_message="update", create_pr=True)
    push(client, run, meanwhile=b"3")
    with pytest.raises(HfHubHTTPError, match="403"):
        volunteer.merge_pull_request(run, 1)
    client.merge_pull_request(run, 1, comment="thanks")
    contents = {path: hub.read(run, path) for path in hub.files(run)}
    assert contents == {"kept": b"1", "changed": b"2", "new": b"2", "meanwhile": b"3"}
    details = client.get_discussion_details(run, 1)
    assert (details.status, details.merge_commit_oid) == ("merged", hub.head(run))
    assert hub.commits(run)[0]["title"] == "update (#1)"
    with pytest.raises(BadRequestError):
        client.merge_pull_request(run, 1)


def test_conflicts_are_named_and_keep_a_merge_out(hub, client, run, volunteer):
    push(client, run, a=b"1", b=b"1")
    propose(volunteer, run, a=b"2", b=b"2")
    push(client, run, a=b"3", b=b"2")
    assert client.get_discussion_details(run, 1).conflicting_files == ["a"]
    with pytest.raises(HfHubHTTPError, match="conflicts: a"):
        client.merge_pull_request(run, 1)
    assert hub.read(run, "a") == b"3"


def test_a_refused_commit_opens_no_pull_request(hub, run, volunteer):
    with pytest.raises(HfHubHTTPError, match="doesn't exist"):
        volunteer.create_commit(run, [CommitOperationDelete("missing")], commit_message="bad", create_pr=True)
    assert hub.discussions(run) == []
    assert list(hub.refs(run)) == ["refs/heads/main"]


def test_pull_requests_made_first_are_drafts(client, run, volunteer):
    draft = volunteer.create_pull_request(run, "An update", description="of mine")
    assert (draft.status, draft.git_reference) == ("draft", "refs/pr/1")
    volunteer.upload_file(path_or_fileobj=b"1", path_in_repo="a", repo_id=run, revision="refs/pr/1")
    with pytest.raises(BadRequestError, match="Only an open pull request can be merged"):
        client.merge_pull_request(run, 1)
    assert volunteer.change_discussion_status(run, 1, "open").new_status == "open"
    client.merge_pull_request(run, 1)
    assert client.file_exists(run, "a")


def test_talk(hub, hub_client, client, run, volunteer):
    asked = volunteer.create_discussion(run, "How?", description="Tell me")
    assert volunteer.comment_discussion(run, asked.num, "Please").content == "Please"
    assert client.rename_discussion(run, asked.num, "How then?").old_title == "How?"
    assert client.change_discussion_status(run, asked.num, "closed", comment="Done").new_status == "closed"
    details = client.get_discussion_details(run, asked.num)
    said = [event.content for event in details.events if event.type == "comment"]
    assert (details.title, said) == ("How then?", ["Tell me", "Please", "Done"])
    with pytest.raises(HfHubHTTPError, match="403"):
        hub_client(hub.user("other")).change_discussion_status(run, asked.num, "open")


def test_lists_are_filtered_and_paged(hub, client, run, volunteer):
    for n in range(3):
        propose(volunteer, run, a=str(n).encode())
    client.create_discussion(run, "A question")
    client.change_discussion_status(run, 2, "closed")
    hub.configure(discussions_page=2)

    def numbers(**filters):
        return sorted(discussion.num for discussion in client.get_repo_discussions(run, **filters))

    assert numbers() == [1, 2, 3, 4]
    assert numbers(discussion_type="pull_request", discussion_status="open") == [1, 3]
    assert numbers(discussion_type="discussion") == numbers(author="ann") == [4]
    assert numbers(discussion_status="closed") == [2]
    assert hub.log.count("/discussions\\?") == 2 + 1 + 1 + 1 + 1
