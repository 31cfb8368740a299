"""What is in a repository and how it came there: trees, paths, commits, refs, branches, tags."""

from __future__ import annotations

import itertools
from typing import Any

from tests.loopback_hub.discussions import timestamp
from tests.loopback_hub.errors import HubError, entry_not_found, revision_not_found
from tests.loopback_hub.objects import Commit, File
from tests.loopback_hub.repository import MAIN, Repository
from tests.loopback_hub.state import HubState
from tests.loopback_hub.wire import REPOSITORY, Request, Response, answer_json, next_page, route


def file_item(path: str, file: File) -> dict[str, Any]:
    item: dict[str, Any] = {"type": "file", "oid": file.oid, "size": file.size, "path": path}
    if file.sha256:
        item["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": file.pointer_size}
    return item


def folder_item(path: str, oid: str) -> dict[str, Any]:
    return {"type": "directory", "oid": oid, "size": 0, "path": path}


@route("GET", f"{REPOSITORY}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?")
def tree(hub: HubState, request: Request, type: str, id: str, revision: str, path: str | None) -> Response:
    repository = hub.readable(request, type, id)
    commit = hub.read_commit(request, repository, revision)
    folder = (path or "").strip("/")
    if folder not in commit.folders:
        raise entry_not_found(f'"{folder}" does not exist on "{revision}"', commit.oid)
    prefix = f"{folder}/" if folder else ""
    recursive = request.flag("recursive")

    def listed(name: str) -> bool:
        return name.startswith(prefix) and name != folder and (recursive or "/" not in name[len(prefix) :])

    items = [folder_item(name, oid) for name, oid in sorted(commit.folders.items()) if name and listed(name)]
    items += [file_item(name, file) for name, file in sorted(commit.files.items()) if listed(name)]
    page, link = next_page(request, items, hub.settings.tree_page)
    if request.flag("expand"):
        _add_last_commits(repository, commit, page)
    return answer_json(page, headers=link)


@route("POST", f"{REPOSITORY}/paths-info/(?P<revision>[^/]+)")
def paths_info(hub: HubState, request: Request, type: str, id: str, revision: str) -> Response:
    repository = hub.readable(request, type, id)
    commit = hub.read_commit(request, repository, revision)
    form = request.form()
    paths = [path.strip("/") for path in form.get("paths", [])]
    if len(paths) > 1000:
        raise HubError(413, "too many parameters")
    items = [file_item(path, commit.files[path]) for path in paths if path in commit.files]
    items += [folder_item(path, commit.folders[path]) for path in paths if path and path in commit.folders]
    if form.get("expand", [""])[0].lower() in ("1", "true"):
        _add_last_commits(repository, commit, items)
    return answer_json(items)


def _add_last_commits(repository: Repository, commit: Commit, items: list[dict[str, Any]]) -> None:
    """The newest commit that changed each item; a folder changes with anything in it."""
    history = repository.history(commit)
    for item in items:
        path, changed = item["path"], history[-1]
        for newer, older in itertools.pairwise(history):
            before = older.files.get(path) if item["type"] == "file" else older.folders.get(path)
            now = newer.files.get(path) if item["type"] == "file" else newer.folders.get(path)
            if before != now:
                changed = newer
                break
        item["lastCommit"] = {"id": changed.oid, "title": changed.title, "date": timestamp(changed.date)}


@route("GET", f"{REPOSITORY}/commits/(?P<revision>[^/]+)")
def commits(hub: HubState, request: Request, type: str, id: str, revision: str) -> Response:
    repository = hub.readable(request, type, id)
    history = repository.history(hub.read_commit(request, repository, revision))
    page, link = next_page(request, history, hub.settings.commits_page)
    items = [
        {
            "id": commit.oid,
            "title": commit.title,
            "message": commit.message,
            "authors": [{"user": commit.author}],
            "date": timestamp(commit.date),
        }
        for commit in page
    ]
    return answer_json(items, headers={**link, "X-Total-Count": str(len(history))})


@route("GET", f"{REPOSITORY}/refs")
def refs(hub: HubState, request: Request, type: str, id: str) -> Response:
    repository = hub.readable(request, type, id)
    found: dict[str, list[dict[str, str]]] = {"branches": [], "converts": [], "tags": []}
    kinds = {"refs/heads/": "branches", "refs/tags/": "tags"}
    if request.flag("include_prs"):
        kinds["refs/pr/"], found["pullRequests"] = "pullRequests", []
    for ref in list(repository.refs):
        for prefix, kind in kinds.items():
            if ref.startswith(prefix):
                target = hub.read_commit(request, repository, ref).oid
                found[kind].append({"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": target})
    return answer_json(found)


@route("POST", f"{REPOSITORY}/branch/(?P<branch>[^/]+)")
def create_branch(hub: HubState, request: Request, type: str, id: str, branch: str) -> Response:
    repository = hub.writable(request, type, id)
    repository.add_ref(f"refs/heads/{branch}", request.json().get("startingPoint") or "main")
    return Response()


@route("DELETE", f"{REPOSITORY}/branch/(?P<branch>[^/]+)")
def delete_branch(hub: HubState, request: Request, type: str, id: str, branch: str) -> Response:
    repository, ref = hub.writable(request, type, id), f"refs/heads/{branch}"
    if ref == MAIN:
        raise HubError(403, "Cannot delete the main branch")
    repository.delete_ref(ref)
    return Response()


@route("POST", f"{REPOSITORY}/tag/(?P<revision>[^/]+)")
def create_tag(hub: HubState, request: Request, type: str, id: str, revision: str) -> Response:
    repository, tag = hub.writable(request, type, id), request.json().get("tag")
    if not tag:
        raise HubError(400, "Tag name is missing")
    repository.add_ref(f"refs/tags/{tag}", revision)
    return Response()


@route("DELETE", f"{REPOSITORY}/tag/(?P<tag>[^/]+)")
def delete_tag(hub: HubState, request: Request, type: str, id: str, tag: str) -> Response:
    hub.writable(request, type, id).delete_ref(f"refs/tags/{tag}")
    return Response()


@route("POST", f"{REPOSITORY}/super-squash/(?P<branch>[^/]+)")
def super_squash(hub: HubState, request: Request, type: str, id: str, branch: str) -> Response:
    repository, token = hub.writable(request, type, id), hub.token(request)
    if f"refs/heads/{branch}" not in repository.refs:
        raise revision_not_found(branch)
    message = request.json().get("message") or f"Super-squash branch '{branch}'"
    with repository.exclusive(hub.faults.commit_seconds):
        repository.squash(branch, message, token.user)
    return Response()
