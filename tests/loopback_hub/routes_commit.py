"""Writing files: how to upload each, where, and the commit itself."""

from __future__ import annotations

import base64
import binascii
import fnmatch
import json
from typing import Any

from tests.loopback_hub.errors import HubError
from tests.loopback_hub.repository import LFS_SUFFIXES, MAIN, Change, Repository
from tests.loopback_hub.routes_repositories import page_of
from tests.loopback_hub.state import HubState
from tests.loopback_hub.wire import REPOSITORY, Request, Response, answer_json, route

LFS_REPOSITORY = r"/(?P<prefix>datasets/)?(?P<id>[^/]+/[^/]+)\.git/info/lfs/objects"
MAX_PREUPLOAD_FILES = 256


def pushable(hub: HubState, request: Request, type: str, id: str, revision: str) -> tuple[Repository, str]:
    """The repository and the ref to move, if the caller may commit there. A new pull request starts at main.

    Pull requests are open to their author, besides all who may write.
    """
    repository = hub.readable(request, type, id)
    if request.flag("create_pr"):
        if not hub.accounts.may_discuss(hub.token(request), repository):
            raise HubError(403, hub.forbidden(hub.token(request), id))
        return repository, MAIN
    commit_to = repository.find_ref(revision)
    discussion = next((d for d in repository.discussions.values() if d.ref == commit_to), None)
    own = discussion is not None and discussion.author == hub.token(request).user
    if not (own and hub.accounts.may_discuss(request.token, repository)):
        hub.writable(request, type, id)
    if commit_to is None or commit_to.startswith("refs/tags/"):
        repository.commit_at(revision)  # says that there is no such revision
        raise HubError(400, f"{revision} is not a branch: commits go to a branch or to a pull request")
    return repository, commit_to


@route("POST", f"{REPOSITORY}/preupload/(?P<revision>[^/]+)")
def preupload(hub: HubState, request: Request, type: str, id: str, revision: str) -> Response:
    repository, ref = pushable(hub, request, type, id, revision)
    present = repository.commit_at(ref, back=request.back).files
    asked = request.json()
    files = asked.get("files", [])
    if len(files) > MAX_PREUPLOAD_FILES:
        raise HubError(413, f"Too many files: {len(files)}, at most {MAX_PREUPLOAD_FILES}")
    ignored = [line.strip() for line in (asked.get("gitIgnore") or "").splitlines() if line.strip()]
    answers = []
    for file in files:
        path = file["path"]
        mode = "lfs" if goes_to_lfs(path, file["size"], base64.b64decode(file["sample"]), hub) else "regular"
        answer = {
            "path": path,
            "uploadMode": mode,
            "shouldIgnore": any(fnmatch.fnmatch(path, pattern) for pattern in ignored),
        }
        if path in present:
            answer["oid"] = present[path].etag
        answers.append(answer)
    return answer_json({"files": answers})


def goes_to_lfs(path: str, size: int, sample: bytes, hub: HubState) -> bool:
    """Large files, known suffixes, and what does not look like text."""
    if size == 0:
        return False
    if size > hub.settings.lfs_above or path.endswith(LFS_SUFFIXES) or b"\0" in sample:
        return True
    try:
        sample.decode()
    except UnicodeDecodeError as error:
        return error.start < len(sample) - 3  # the sample may end within a character
    return False


@route("POST", f"{LFS_REPOSITORY}/batch")
def lfs_batch(hub: HubState, request: Request, id: str, prefix: str | None) -> Response:
    repository, asked = _lfs_repository(hub, request, id, prefix), request.json()
    verify = {"href": f"{page_of(request, repository)}.git/info/lfs/objects/verify"}
    if prefix is None:
        verify = {"href": f"{request.endpoint}/{id}.git/info/lfs/objects/verify"}
    objects = []
    for item in asked.get("objects", []):
        oid, size = str(item["oid"]), int(item["size"])
        objects.append({"oid": oid, "size": size})
        if not repository.has_lfs(oid):
            objects[-1]["actions"] = {"upload": _upload_action(hub, request, repository, oid, size), "verify": verify}
    return answer_json({"transfer": "basic", "objects": objects})


def _upload_action(hub: HubState, request: Request, repository: Repository, oid: str, size: int) -> dict[str, Any]:
    at, part = f"/{repository.type}s/{repository.id}/{oid}", hub.settings.part_size
    if size <= hub.settings.multipart_above or "multipart" not in request.json().get("transfers", []):
        return {"href": hub.signed(request, f"/objects{at}")}
    parts = range(1, -(-size // part) + 1)
    header = {f"{number:05}": hub.signed(request, f"/parts{at}/{number}") for number in parts}
    return {"href": hub.signed(request, f"/complete{at}"), "header": {"chunk_size": str(part), **header}}


@route("POST", f"{LFS_REPOSITORY}/verify")
def lfs_verify(hub: HubState, request: Request, id: str, prefix: str | None) -> Response:
    repository, asked = _lfs_repository(hub, request, id, prefix), request.json()
    content = repository.lfs(str(asked.get("oid")))
    if content is None or len(content) != asked.get("size"):
        raise HubError(404, f"LFS object {asked.get('oid')} of {asked.get('size')} bytes not found")
    return answer_json({})


def _lfs_repository(hub: HubState, request: Request, id: str, prefix: str | None) -> Repository:
    """Uploads are open to all who may open a pull request: the commit decides what becomes of them."""
    type = "dataset" if prefix else "model"
    repository, token = hub.readable(request, type, id), hub.token(request)
    if not (hub.accounts.may_discuss(token, repository) or hub.accounts.may_write(token, repository)):
        raise HubError(403, hub.forbidden(token, id))
    return repository


@route("POST", f"{REPOSITORY}/commit/(?P<revision>[^/]+)")
def commit(hub: HubState, request: Request, type: str, id: str, revision: str) -> Response:
    repository, ref = pushable(hub, request, type, id, revision)
    token = hub.token(request)
    header, changes = parse_commit(request.body)
    title, message, parent = header["summary"], header.get("description") or "", header.get("parentCommit")
    if not title:
        raise HubError(400, "Commit summary is missing")
    with repository.exclusive(hub.faults.commit_seconds):
        if not request.flag("create_pr"):
            made = repository.commit(ref, changes, title, message, token.user, parent)
            discussion = next((d for d in repository.discussions.values() if d.ref == ref), None)
        else:
            discussion = repository.add_discussion(title, message, token.user, pull_request=True, status="open")
            try:
                made = repository.commit(discussion.ref, changes, title, message, token.user, parent)
            except HubError:
                repository.discard(discussion)
                raise
    page = page_of(request, repository)
    answer = {"success": True, "commitOid": made.oid, "commitUrl": f"{page}/commit/{made.oid}", "hookOutput": ""}
    if discussion is not None:
        discussion.add_commit(token.user, made.oid, title)
        if request.flag("create_pr"):
            answer["pullRequestUrl"] = f"{page}/discussions/{discussion.num}"
    return answer_json(answer)


def parse_commit(body: bytes) -> tuple[dict[str, Any], list[Change]]:
    """Header and changes of an application/x-ndjson commit. 400 for anything malformed."""
    header: dict[str, Any] = {}
    changes = []
    try:
        for line in filter(None, body.split(b"\n")):
            item = json.loads(line)
            kind, value = item["key"], item["value"]
            if kind == "header":
                header = {"summary": "", **value}
            elif kind == "file":
                changes.append(Change(kind, value["path"], base64.b64decode(value["content"], validate=True)))
            elif kind == "lfsFile":
                changes.append(Change(kind, value["path"], sha256=value["oid"]))
            else:
                changes.append(Change(kind, value["path"]))
    except (ValueError, KeyError, TypeError, binascii.Error) as error:
        raise HubError(400, f"Malformed commit: {error}") from error
    if "summary" not in header:
        raise HubError(400, "Malformed commit: no header")
    return header, changes
