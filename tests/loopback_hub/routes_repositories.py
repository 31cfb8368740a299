"""Creating, deleting, describing and listing repositories."""

from __future__ import annotations

from typing import Any

from tests.loopback_hub.discussions import timestamp
from tests.loopback_hub.errors import HubError, repository_not_found
from tests.loopback_hub.objects import Commit
from tests.loopback_hub.repository import Repository
from tests.loopback_hub.routes_accounts import card_metadata
from tests.loopback_hub.state import HubState
from tests.loopback_hub.store import TYPES
from tests.loopback_hub.wire import REPOSITORY, Request, Response, answer_json, next_page, route


def page_of(request: Request, repository: Repository) -> str:
    """The web address of a repository."""
    prefix = "" if repository.type == "model" else f"{repository.type}s/"
    return f"{request.endpoint}/{prefix}{repository.id}"


@route("POST", "/api/repos/create")
def create(hub: HubState, request: Request) -> Response:
    token, asked = hub.token(request), request.json()
    namespace, name, type = asked.get("organization") or token.user, asked.get("name"), asked.get("type") or "model"
    if not name or type not in TYPES:
        raise HubError(400, f"Cannot create a repository of type {type!r} named {name!r}")
    id = f"{namespace}/{name}"
    if not hub.accounts.may_create(token, namespace):
        raise HubError(403, f'You don\'t have the rights to create a {type} under the namespace "{namespace}"')
    private = asked.get("visibility") == "private" or bool(asked.get("private"))
    repository, new = hub.store.create(id, type, token.user, private)
    url = page_of(request, repository)
    if not new:  # the client reads the url of a conflict, too
        raise HubError(409, f"You already created this {type} repo: {id}", payload={"url": url})
    return answer_json({"url": url, "name": id, "id": id})


@route("DELETE", "/api/repos/delete")
def delete(hub: HubState, request: Request) -> Response:
    asked = request.json()
    type = asked.get("type") or "model"
    id = f"{asked.get('organization') or hub.token(request).user}/{asked.get('name')}"
    hub.writable(request, type, id)
    hub.store.delete(id, type)
    return Response()


@route("PUT", f"{REPOSITORY}/settings")
def settings(hub: HubState, request: Request, type: str, id: str) -> Response:
    repository, asked = hub.writable(request, type, id), request.json()
    if "visibility" in asked or "private" in asked:
        repository.private = asked.get("visibility") == "private" or bool(asked.get("private"))
    if "gated" in asked:
        repository.gated = asked["gated"]
    return answer_json({"private": repository.private, "gated": repository.gated})


@route("GET", f"{REPOSITORY}(?:/revision/(?P<revision>[^/]+))?")
def info(hub: HubState, request: Request, type: str, id: str, revision: str | None) -> Response:
    repository = hub.readable(request, type, id)
    commit = hub.read_commit(request, repository, revision or "main")
    return answer_json(_expanded(request, describe(repository, commit, request.flag("blobs"))))


@route("GET", "/api/(?P<type>model|dataset)s")
def listing(hub: HubState, request: Request, type: str) -> Response:
    author, search = request.first("author"), (request.first("search") or "").lower()
    wanted = set(request.query.get("filter", []))
    items = []
    for repository in reversed(hub.store.all(type)):
        if author not in (None, repository.namespace) or search not in repository.id.lower():
            continue
        if not hub.accounts.may_read(request.token, repository):
            continue
        described = describe(repository, hub.read_commit(request, repository, "main"))
        if wanted <= set(described["tags"]):
            if not request.flag("full"):
                described.pop("siblings")
            items.append(_expanded(request, described))
    limit = request.number("limit", len(items))
    page, link = next_page(request, items, min(limit or len(items), hub.settings.list_page))
    return answer_json(page, headers=link)


def describe(repository: Repository, commit: Commit, blobs: bool = False) -> dict[str, Any]:
    """The Hub's description of a repository at a commit; with `blobs`, with sizes and object names."""
    readme = commit.files.get("README.md")
    text = repository.content(readme).decode(errors="replace") if readme else ""
    card, _ = card_metadata(text)
    tags = card["tags"] if isinstance(card.get("tags"), list) else []
    siblings: list[dict[str, Any]] = []
    for path, file in sorted(commit.files.items()):
        siblings.append({"rfilename": path})
        if blobs:
            siblings[-1] |= {"size": file.size, "blobId": file.oid}
            if file.sha256:
                lfs = {"sha256": file.sha256, "size": file.size, "pointerSize": file.pointer_size}
                siblings[-1]["lfs"] = lfs
    described = {
        "_id": f"{repository.type}:{repository.id}",
        "id": repository.id,
        "author": repository.namespace,
        "sha": commit.oid,
        "lastModified": timestamp(commit.date),
        "createdAt": timestamp(repository.created_at),
        "private": repository.private,
        "gated": repository.gated,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": sorted({str(tag) for tag in tags}),
        "siblings": siblings,
        "cardData": card or None,
    }
    if repository.type == "model":
        described["modelId"] = repository.id
        if card.get("library_name"):
            described["library_name"] = card["library_name"]
    return described


def _expanded(request: Request, described: dict[str, Any]) -> dict[str, Any]:
    names = request.query.get("expand")
    if not names:
        return described
    return {name: described[name] for name in ("_id", "id", *names) if name in described}


@route("POST", f"{REPOSITORY}/user-access-request/grant")
def grant_access(hub: HubState, request: Request, type: str, id: str) -> Response:
    repository = hub.writable(request, type, id)
    user = request.json().get("user")
    if user not in hub.accounts.users:
        raise repository_not_found()
    repository.granted.add(user)
    return answer_json({})
