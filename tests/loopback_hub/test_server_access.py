"""Who may do what on the loopback Hub, as the real client sees it."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import get_session, hf_hub_url
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from tests.loopback_hub.conftest import push

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def people(hub, hub_client):
    """Clients of one user of every kind; lab/open is public and lab/closed private, both made by the owner."""
    tokens = {
        "owner": hub.user("owner", "admin", org="lab"),
        "writer": hub.user("writer", "write", org="lab"),
        "contributor": hub.user("contributor", "contributor", org="lab"),
        "helper": hub.user("helper", "write", org="lab", member="contributor"),
        "reader": hub.user("reader", "read", org="lab"),
        "volunteer": hub.user("volunteer", "write", org="lab", member="read"),
        "stranger": hub.user("stranger", "write"),
    }
    tokens["deputy"] = hub.token("owner", "fineGrained", repos=["lab/closed"])
    hub.repo("lab/open", creator="owner")
    hub.repo("lab/closed", private=True, creator="owner")
    return {name: hub_client(token) for name, token in tokens.items()} | {"nobody": hub_client()}


def status(call, *args, **kwargs):
    """200, or the status of the error raised."""
    try:
        call(*args, **kwargs)
    except HfHubHTTPError as error:
        return error.response.status_code
    return 200


ACTIONS = ("open", "closed", "write open", "write closed", "create", "pull request open", "pull request closed")
RIGHTS = {
    "owner": (200, 200, 200, 200, 200, 200, 200),
    "writer": (200, 200, 200, 200, 200, 200, 200),
    "contributor": (200, 200, 403, 403, 200, 403, 403),
    "helper": (200, 200, 403, 403, 200, 200, 200),
    "reader": (200, 200, 403, 403, 403, 403, 403),
    "volunteer": (200, 200, 403, 403, 403, 200, 200),
    "stranger": (200, 404, 403, 404, 403, 200, 404),
    "deputy": (200, 200, 403, 200, 403, 403, 200),
    "nobody": (200, 404, 401, 404, 401, 401, 404),
}


@pytest.mark.parametrize("who", RIGHTS)
def test_rights(people, who):
    client = people[who]
    expected = dict(zip(ACTIONS, RIGHTS[who], strict=True))
    found = {name: status(client.repo_info, f"lab/{name}") for name in ("open", "closed")}
    for name in ("open", "closed"):
        assert status(client.auth_check, f"lab/{name}") == found[name]
        found[f"write {name}"] = status(push, client, f"lab/{name}", a=who.encode())
        assert status(client.auth_check, f"lab/{name}", write=True) == found[f"write {name}"]
    found["create"] = status(client.create_repo, "lab/new")
    for name in ("open", "closed"):
        ask = {"path_or_fileobj": b"2", "path_in_repo": f"by/{who}.bin", "create_pr": True}
        found[f"pull request {name}"] = status(client.upload_file, repo_id=f"lab/{name}", **ask)
    assert found == expected


def test_a_contributor_writes_what_it_made_and_nothing_else(hub, hub_client, people):
    mine, other = people["contributor"], hub_client(hub.user("other", "contributor", org="lab"))
    mine.create_repo("lab/run-c1", private=True)
    push(mine, "lab/run-c1", a=b"1")
    assert status(push, other, "lab/run-c1", a=b"2") == 403
    assert status(other.delete_repo, "lab/run-c1") == 403
    assert status(other.hf_hub_download, "lab/run-c1", "a") == 200  # members read each other's
    assert status(push, people["owner"], "lab/run-c1", a=b"3") == 200
    assert mine.create_repo("lab/closed", exist_ok=True).repo_id == "lab/closed"
    mine.update_repo_settings("lab/run-c1", private=False)
    assert status(people["stranger"].repo_info, "lab/run-c1") == 200


def test_private_repositories_are_not_listed_nor_named_to_strangers(people):
    assert [model.id for model in people["stranger"].list_models(author="lab")] == ["lab/open"]
    assert [model.id for model in people["reader"].list_models(author="lab")] == ["lab/closed", "lab/open"]
    with pytest.raises(RepositoryNotFoundError):
        people["stranger"].hf_hub_download("lab/closed", ".gitattributes")
    with pytest.raises(RepositoryNotFoundError):
        people["stranger"].get_discussion_details("lab/closed", 1)


def test_tokens_that_do_not_exist_any_more(hub, hub_client):
    hub.repo("lab/open")
    token = hub.user("ann")
    hub.revoke(token)
    with pytest.raises(HfHubHTTPError, match="Invalid credentials in Authorization header") as refused:
        hub_client(token).repo_info("lab/open")
    assert not isinstance(refused.value, RepositoryNotFoundError)


def test_gates(hub, hub_client, people):
    hub.write("lab/open", {"a": b"1"})
    hub.gate("lab/open", granted=["granted"])
    stranger, granted = people["stranger"], hub_client(hub.user("granted"))
    assert stranger.model_info("lab/open").gated == "manual"
    for closed in (stranger, people["nobody"]):
        with pytest.raises(GatedRepoError):
            closed.hf_hub_download("lab/open", "a")
        with pytest.raises(GatedRepoError):
            closed.auth_check("lab/open")
    for client in (granted, people["reader"]):
        assert Path(client.hf_hub_download("lab/open", "a", force_download=True)).read_bytes() == b"1"
    people["owner"].grant_access("lab/open", "stranger")
    stranger.auth_check("lab/open")


def test_links_into_the_object_storage_are_signed_and_take_no_token(hub, people):
    push(people["owner"], "lab/closed", **{"a.bin": b"secret"})
    url = hf_hub_url("lab/closed", "a.bin", endpoint=hub.endpoint)
    session, bearer = get_session(), {"Authorization": f"Bearer {people['owner'].token}"}
    redirect = session.get(url, headers=bearer, follow_redirects=False)
    link = redirect.headers["Location"]
    assert redirect.status_code == 302
    assert not link.startswith(hub.endpoint)
    assert session.get(link).content == b"secret"
    assert session.get(link, headers=bearer).status_code == 400
    assert session.get(link.replace("signature=", "signature=0")).status_code == 403
    assert session.put(link, content=b"other").status_code == 400  # not what its name says
    assert hub.read("lab/closed", "a.bin") == b"secret"
