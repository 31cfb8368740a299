"""Downloads: resolve with its two kinds of redirect, and the cache of regular files behind one of them."""

from __future__ import annotations

import re
from urllib.parse import quote

from tests.loopback_hub.errors import HubError, entry_not_found
from tests.loopback_hub.state import HubState
from tests.loopback_hub.wire import Request, Response, route


@route("GET", r"/(?P<prefix>datasets/)?(?P<id>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
def resolve(hub: HubState, request: Request, id: str, revision: str, path: str, prefix: str | None) -> Response:
    """LFS files: 302 to the object storage. Regular ones: 307 to the same origin, at the commit now seen."""
    type = "dataset" if prefix else "model"
    repository = hub.downloadable(request, type, id)
    commit = hub.read_commit(request, repository, revision)
    file = commit.files.get(path)
    if file is None:
        raise entry_not_found(commit=commit.oid)
    headers = {
        "X-Repo-Commit": commit.oid,
        "Accept-Ranges": "bytes",
        "X-Linked-Size": str(file.size),
        "X-Linked-Etag": f'"{file.etag}"',
        "ETag": f'"{file.oid}"',
    }
    if file.sha256:
        location = hub.signed(request, f"/objects/{type}s/{id}/{file.sha256}")
        return Response(302, f"Found. Redirecting to {location}".encode(), {**headers, "Location": location})
    location = f"/api/resolve-cache/{type}s/{id}/{commit.oid}/{quote(path)}"
    body = f"Temporary Redirect. Redirecting to {location}".encode()
    return Response(307, body, {**headers, "Location": location})


@route("GET", r"/api/resolve-cache/(?P<type>model|dataset)s/(?P<id>[^/]+/[^/]+)/(?P<commit>[0-9a-f]{40})/(?P<path>.+)")
def resolve_cache(hub: HubState, request: Request, type: str, id: str, commit: str, path: str) -> Response:
    repository = hub.downloadable(request, type, id)
    found = repository.commit_at(commit)
    file = found.files.get(path)
    if file is None or file.sha256:
        raise entry_not_found(commit=found.oid)
    return ranged(request, repository.content(file), {"X-Repo-Commit": found.oid, "ETag": f'"{file.oid}"'})


def ranged(request: Request, content: bytes, headers: dict[str, str]) -> Response:
    """The content, or the part of it that a Range header asks for. 416 for a part beyond the end."""
    headers = {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream", **headers}
    asked = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("Range") or "")
    if asked is None or asked.groups() == ("", ""):
        return Response(200, content, headers)
    first, last = asked.groups()
    if not first:
        start, end = max(len(content) - int(last), 0), len(content)
    else:
        start, end = int(first), min(int(last) + 1 if last else len(content), len(content))
    if start >= end:
        raise HubError(416, "Range Not Satisfiable", headers={"Content-Range": f"bytes */{len(content)}"})
    return Response(206, content[start:end], {**headers, "Content-Range": f"bytes {start}-{end - 1}/{len(content)}"})
