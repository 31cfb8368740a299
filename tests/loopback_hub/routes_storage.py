"""The object storage: a second origin whose signed links need no token and refuse one."""

from __future__ import annotations

import hashlib

from tests.loopback_hub.errors import HubError
from tests.loopback_hub.routes_files import ranged
from tests.loopback_hub.state import HubState
from tests.loopback_hub.wire import STORAGE, Request, Response, answer_json, route

OBJECT = r"/(?P<type>model|dataset)s/(?P<id>[^/]+/[^/]+)/(?P<sha256>[0-9a-f]{64})"


@route("GET", f"/objects{OBJECT}", STORAGE)
def download(hub: HubState, request: Request, type: str, id: str, sha256: str) -> Response:
    hub.check_signature(request)
    content = hub.store.get(id, type).lfs(sha256)
    if content is None:
        raise HubError(404, "NoSuchKey")
    return ranged(request, content, {"ETag": f'"{sha256}"'})


@route("PUT", f"/objects{OBJECT}", STORAGE)
def upload(hub: HubState, request: Request, type: str, id: str, sha256: str) -> Response:
    hub.check_signature(request)
    hub.store.get(id, type).put_lfs(sha256, request.body)
    return Response()


@route("PUT", rf"/parts{OBJECT}/(?P<number>\d+)", STORAGE)
def upload_part(hub: HubState, request: Request, type: str, id: str, sha256: str, number: str) -> Response:
    hub.check_signature(request)
    hub.parts[sha256, int(number)] = request.body
    return Response(headers={"ETag": _etag(request.body)})


@route("POST", f"/complete{OBJECT}", STORAGE)
def complete(hub: HubState, request: Request, type: str, id: str, sha256: str) -> Response:
    hub.check_signature(request)
    numbers = [int(part["partNumber"]) for part in request.json().get("parts", [])]
    etags = [part["etag"] for part in request.json().get("parts", [])]
    parts = [hub.parts.get((sha256, number)) for number in numbers]
    if any(part is None or _etag(part) != etag for part, etag in zip(parts, etags, strict=True)):
        raise HubError(400, "InvalidPart")
    hub.store.get(id, type).put_lfs(sha256, b"".join(part for part in parts if part is not None))
    for number in numbers:
        hub.parts.pop((sha256, number), None)
    return answer_json({"success": True})


def _etag(content: bytes) -> str:
    return f'"{hashlib.md5(content).hexdigest()}"'
