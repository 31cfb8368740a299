"""What the loopback Hub does wrong on request: at random with a seed, or to the next requests that match."""

from __future__ import annotations

import random
import re
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from tests.loopback_hub.errors import HubError
from tests.loopback_hub.repository import BUSY, STALE_PARENT
from tests.loopback_hub.wire import Request

_COMMIT = r"POST /api/.*/commit/[^/]+"
_UPLOAD = rf"{_COMMIT}|POST .*/objects/batch|POST /api/repos/create"
_READ = r"(GET|HEAD) (/api/(models|datasets)/|/.+/resolve/).*|POST /api/.*/paths-info/.*"
_DOWNLOAD = r"GET (/api/resolve-cache|/objects)/.*"
_GET = r"GET .*"
_ANY = r".*"

# kind: the requests ("METHOD raw-path") that it can befall
KINDS = {
    "409": _COMMIT,  # another commit is in progress
    "412": _COMMIT,  # a commit has happened since
    "429": _ANY,  # with Retry-After
    "429-ratelimit": _ANY,  # with the RateLimit header instead
    "commit-rate": _COMMIT,  # 429, "128 per hour"
    "create-busy": r"POST /api/repos/create",  # 409 that the client repeats for ever
    "quota": _UPLOAD,  # 403, storage limit
    "507": _UPLOAD,
    "500": _ANY,  # nothing was done
    "503": _ANY,
    "500-after": _ANY,  # the work was done
    "lost": _ANY,  # the work was done, then the connection closes without an answer
    "hang": _ANY,  # nothing was done; silence for `hang_seconds`, then the connection closes
    "cut": _GET,  # half of the body, then the connection closes
    "corrupt": _DOWNLOAD,  # some bytes flipped
    "stale": _READ,  # the ref as it stood one move ago
}
RANDOM_KINDS = ("409", "412", "429", "500", "500-after", "hang", "cut", "corrupt", "stale")
_COMMIT_RATE = (
    "You have exceeded the rate limit for repository commits (128 per hour). You can retry this action in about 1 hour"
)


@dataclass
class Rule:
    """The next `times` requests that match get a fault. `path` is searched in the raw path with its query."""

    kind: str
    path: str = ""
    method: str | None = None
    user: str | None = None
    times: int = 1

    def matches(self, request: Request, target: str) -> bool:
        return (
            self.times > 0
            and self.method in (None, request.method)
            and self.user in (None, request.user)
            and re.search(self.path, target) is not None
        )


@dataclass
class Faults:
    """All off by default. Attributes may be set at any time; `once` adds a rule that comes before chance."""

    commit_seconds: float = 0.0  # a commit takes that long, and another one to the same repository gets 409 meanwhile
    stale_seconds: float = 0.0  # reads see every ref as it stood that long ago
    rate: float = 0.0  # chance that a request is hit by one of `kinds`
    kinds: Sequence[str] = RANDOM_KINDS
    match: str = ""  # only requests in whose "METHOD raw-path" this is found are hit at random
    seed: int = 0
    hang_seconds: float = 1.0
    retry_after: int = 0  # seconds told with 429

    def __post_init__(self) -> None:
        self._rules: list[Rule] = []
        self._seen: Counter[str | None] = Counter()
        self._lock = threading.Lock()

    def configure(self, **settings: Any) -> None:
        """Set attributes by name."""
        names = [field.name for field in fields(self)]
        for name, value in settings.items():
            if name not in names:
                raise ValueError(f"unknown fault setting {name!r}: expected one of {', '.join(names)}")
            setattr(self, name, value)
        for kind in self.kinds:
            _check(kind)

    def once(
        self, kind: str, path: str = "", method: str | None = None, user: str | None = None, times: int = 1
    ) -> None:
        """Hit the next `times` requests of that method and user in whose raw path `path` (a regex) is found."""
        _check(kind)
        self._rules.append(Rule(kind, path, method, user, times))

    def clear(self) -> None:
        """All off again."""
        with self._lock:
            self._rules.clear()
            self._seen.clear()
        for field in fields(self):
            setattr(self, field.name, field.default)

    def choose(self, request: Request, target: str) -> str | None:
        """The fault of this request; `target` is its raw path with the query.

        Chance depends on the seed, the user and how many requests the user has made, so that one client's faults
        do not depend on what the others do.
        """
        with self._lock:
            number = self._seen[request.user]
            self._seen[request.user] += 1
            for rule in self._rules:
                if rule.matches(request, target):
                    rule.times -= 1
                    return rule.kind
        line = f"{request.method} {request.path}"
        if self.rate <= 0 or not re.search(self.match, line):
            return None
        chance = random.Random(f"{self.seed}|{request.user}|{number}")
        possible = [kind for kind in self.kinds if re.fullmatch(KINDS[kind], line)]
        return chance.choice(possible) if chance.random() < self.rate and possible else None

    def refuse(self, kind: str | None) -> None:
        """Raise the answer of a fault that keeps the work from being done; nothing for the others."""
        match kind:
            case "409":
                raise HubError(409, BUSY)
            case "412":
                raise HubError(412, STALE_PARENT)
            case "429":
                raise HubError(429, "Too Many Requests", headers={"Retry-After": str(self.retry_after)})
            case "429-ratelimit":
                limits = {"RateLimit": f'"api";r=0;t={self.retry_after}'}
                limits["RateLimit-Policy"] = '"fixed window";"api";q=1000;w=300'
                raise HubError(429, "Too Many Requests", headers=limits)
            case "commit-rate":
                raise HubError(429, _COMMIT_RATE)
            case "create-busy":
                raise HubError(409, "Cannot create repo: another conflicting operation is in progress")
            case "quota":
                raise HubError(403, "Private repository storage limit reached, please upgrade your plan")
            case "507":
                raise HubError(507, "Storage quota exceeded")
            case "500":
                raise HubError(500, "Internal Error - We're working hard to fix this as soon as possible!")
            case "503":
                raise HubError(503, "Service Unavailable")


def corrupted(body: bytes) -> bytes:
    """The body with a byte in its middle and its last byte flipped; the length stays."""
    damaged = bytearray(body)
    for position in {len(damaged) // 2, len(damaged) - 1} if damaged else ():
        damaged[position] ^= 0xFF
    return bytes(damaged)


def _check(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"unknown fault {kind!r}: expected one of {', '.join(KINDS)}")
