"""Discussions and pull requests."""

from __future__ import annotations

from tests.loopback_hub.discussions import STATUSES, Discussion
from tests.loopback_hub.errors import HubError
from tests.loopback_hub.repository import Repository
from tests.loopback_hub.state import HubState
from tests.loopback_hub.wire import REPOSITORY, Request, Response, answer_json, route

DISCUSSION = rf"{REPOSITORY}/discussions/(?P<num>\d+)"


@route("GET", f"{REPOSITORY}/discussions")
def listing(hub: HubState, request: Request, type: str, id: str) -> Response:
    repository = hub.readable(request, type, id)
    kind, status, author = request.first("type"), request.first("status"), request.first("author")
    found = []
    for discussion in reversed(list(repository.discussions.values())):
        is_open = discussion.status in ("open", "draft")
        if kind in ("discussion", "pull_request") and discussion.is_pull_request != (kind == "pull_request"):
            continue
        if (status == "open" and not is_open) or (status == "closed" and is_open):
            continue
        if author in (None, discussion.author):
            found.append(discussion.summary(id, type))
    start = request.number("p", 0) * hub.settings.discussions_page
    page = found[start : start + hub.settings.discussions_page]
    return answer_json({"discussions": page, "count": len(found), "start": start})


@route("POST", f"{REPOSITORY}/discussions")
def create(hub: HubState, request: Request, type: str, id: str) -> Response:
    repository, asked, token = hub.readable(request, type, id), request.json(), hub.token(request)
    if not hub.accounts.may_discuss(token, repository):
        raise HubError(403, hub.forbidden(token, id))
    title = str(asked.get("title") or "").strip()
    if not 3 <= len(title) <= 200:
        raise HubError(400, "Discussion title must be between 3 and 200 characters long")
    pull_request = bool(asked.get("pullRequest"))
    status = "draft" if pull_request else "open"
    discussion = repository.add_discussion(title, str(asked.get("description") or ""), token.user, pull_request, status)
    return answer_json({"num": discussion.num, "pullRequest": pull_request})


@route("GET", DISCUSSION)
def details(hub: HubState, request: Request, type: str, id: str, num: str) -> Response:
    repository = hub.readable(request, type, id)
    discussion = find(repository, num)
    described = {**discussion.summary(id, type), "events": discussion.events, "filesWithConflicts": []}
    if discussion.is_pull_request:
        described["changes"] = {"base": "refs/heads/main", "mergeCommitId": discussion.merge_commit}
        if discussion.status != "merged":
            described["filesWithConflicts"] = repository.conflicts(discussion)
        described["diff"] = _changed_paths(repository, discussion)
    return answer_json(described)


def _changed_paths(repository: Repository, discussion: Discussion) -> str:
    """Names only: nobody reads the lines of a binary message."""
    base = repository.commit_at(discussion.base or "main").files
    head = repository.commit_at(discussion.ref).files
    changed = sorted(path for path in base.keys() | head.keys() if base.get(path) != head.get(path))
    return "".join(f"diff --git a/{path} b/{path}\n" for path in changed)


@route("POST", f"{DISCUSSION}/comment")
def comment(hub: HubState, request: Request, type: str, id: str, num: str) -> Response:
    repository, token = hub.readable(request, type, id), hub.token(request)
    if not hub.accounts.may_discuss(token, repository):
        raise HubError(403, hub.forbidden(token, id))
    text = str(request.json().get("comment") or "")
    return answer_json({"newMessage": find(repository, num).comment(token.user, text)})


@route("POST", f"{DISCUSSION}/title")
def title(hub: HubState, request: Request, type: str, id: str, num: str) -> Response:
    repository = hub.readable(request, type, id)
    discussion = _changeable(hub, request, repository, num)
    new = str(request.json().get("title") or "")
    return answer_json({"newTitle": discussion.set_title(hub.token(request).user, new)})


@route("POST", f"{DISCUSSION}/status")
def status(hub: HubState, request: Request, type: str, id: str, num: str) -> Response:
    repository, asked = hub.readable(request, type, id), request.json()
    discussion, user = _changeable(hub, request, repository, num), hub.token(request).user
    wanted = asked.get("status")
    if wanted not in STATUSES or wanted == "merged" or discussion.status == "merged":
        raise HubError(400, f"Cannot change the status from {discussion.status} to {wanted}")
    if asked.get("comment"):
        discussion.comment(user, str(asked["comment"]))
    return answer_json({"newStatus": discussion.set_status(user, wanted)})


@route("POST", f"{DISCUSSION}/merge")
def merge(hub: HubState, request: Request, type: str, id: str, num: str) -> Response:
    repository, user = hub.writable(request, type, id), hub.token(request).user
    discussion = find(repository, num)
    if not discussion.is_pull_request or discussion.status != "open":
        raise HubError(400, f"Only an open pull request can be merged, this is {discussion.status}")
    with repository.exclusive(hub.faults.commit_seconds):
        repository.merge(discussion, user)
    if text := request.json().get("comment"):
        discussion.comment(user, str(text))
    discussion.set_status(user, "merged")
    return Response()


def find(repository: Repository, num: str) -> Discussion:
    discussion = repository.discussions.get(int(num))
    if discussion is None:
        raise HubError(404, "Discussion not found")
    return discussion


def _changeable(hub: HubState, request: Request, repository: Repository, num: str) -> Discussion:
    discussion, token = find(repository, num), hub.token(request)
    if discussion.author != token.user and not hub.accounts.may_write(token, repository):
        raise HubError(403, hub.forbidden(token, repository.id))
    return discussion
