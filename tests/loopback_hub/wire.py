"""Requests, answers and the table of routes. Routes match the raw path: a quoted revision is one segment."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from email.message import Message
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlencode

from tests.loopback_hub.errors import HubError

if TYPE_CHECKING:
    from tests.loopback_hub.accounts import Token
    from tests.loopback_hub.state import HubState

HUB, STORAGE = "hub", "storage"  # the two origins: the Hub itself, and the object storage behind its redirects
REPOSITORY = r"/api/(?P<type>model|dataset)s/(?P<id>[^/]+/[^/]+)"


@dataclass
class Request:
    """A request as routes see it. `back` makes its reads stale by that many moves of the ref."""

    method: str
    path: str  # raw, without the query
    query: dict[str, list[str]]
    headers: Message  # names in any case
    body: bytes
    origin: str
    host: str
    token: Token | None = None
    back: int = 0

    @property
    def user(self) -> str | None:
        """Who asks: the token's user; at the object storage, the user for whom the link was signed."""
        return self.token.user if self.token else self.first("by")

    @property
    def endpoint(self) -> str:
        return f"http://{self.host}"

    def first(self, name: str) -> str | None:
        values = self.query.get(name)
        return values[0] if values else None

    def flag(self, name: str) -> bool:
        return (self.first(name) or "").lower() in ("1", "true")

    def number(self, name: str, default: int) -> int:
        value = self.first(name) or ""
        return int(value) if value.isdigit() else default

    def json(self) -> dict[str, Any]:
        """The body, an object. 400 if it is not one."""
        try:
            content = json.loads(self.body or b"{}")
        except ValueError:
            content = None
        if not isinstance(content, dict):
            raise HubError(400, "Invalid JSON body")
        return content

    def form(self) -> dict[str, list[str]]:
        return parse_qs(self.body.decode(), keep_blank_values=True)


@dataclass
class Response:
    """An answer. HEAD sends the headers of the whole body without it."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


def answer_json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(status, json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})})


def answer_error(error: HubError) -> Response:
    """As the Hub reports errors: JSON, and the same words in headers, since HEAD has no body."""
    headers = {"X-Error-Message": error.message, **error.headers}
    if error.code:
        headers["X-Error-Code"] = error.code
    return answer_json({"error": error.message, **error.payload}, error.status, headers)


def next_page(
    request: Request, items: list[Any], size: int, cursor_name: str = "cursor"
) -> tuple[list[Any], dict[str, str]]:
    """A page of `items` and the Link header to the next one; the cursor is an offset."""
    start = request.number(cursor_name, 0)
    page, following = items[start : start + size], start + size
    if following >= len(items):
        return page, {}
    query = {**request.query, cursor_name: [str(following)]}
    return page, {"Link": f'<{request.endpoint}{request.path}?{urlencode(query, doseq=True)}>; rel="next"'}


Route = Callable[..., Response]
_ROUTES: list[tuple[str, str, re.Pattern[str], Route]] = []


def route(method: str, path: str, origin: str = HUB) -> Callable[[Route], Route]:
    """Answer that method and path (a regular expression on the raw path) with the decorated function.

    It is called with the state, the request and the named groups of the path, unquoted.
    """

    def register(function: Route) -> Route:
        _ROUTES.append((origin, method, re.compile(path), function))
        return function

    return register


def dispatch(hub: HubState, request: Request) -> Response:
    """The answer of the route that matches. 404 if none does, as for a repository that is not there."""
    method = "GET" if request.method == "HEAD" else request.method
    for origin, of_method, path, function in _ROUTES:
        if origin == request.origin and of_method == method and (match := path.fullmatch(request.path)):
            groups = {name: unquote(value) if value else value for name, value in match.groupdict().items()}
            return function(hub, request, **groups)
    if re.match(r"/api/(models|datasets)/", request.path):
        raise HubError(404, "Repository not found", "RepoNotFound")
    raise HubError(404, f"Sorry, we can't find the page you are looking for: {request.method} {request.path}")
