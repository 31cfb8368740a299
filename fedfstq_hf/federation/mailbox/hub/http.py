"""Requests with a timeout, repeated until a deadline: what an error means, how long to wait, and when to give up.

The Hub client has no timeout of its own, and a silent server would hang it for ever. Retry counts are the wrong measure
here. A repo that commits for twenty clients is busy for a minute; a message is worth sending until its round closes.
"""

from __future__ import annotations

import logging
import math
import os
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar

import huggingface_hub
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session, httpx, parse_ratelimit_headers

from fedfstq_hf.errors import FedFSTQError, MailboxError, MailboxUnavailableError
from fedfstq_hf.federation.mailbox.protocol import UNATTENDED_SECONDS

logger = logging.getLogger(__name__)

T = TypeVar("T")

DEFAULT_PATIENCE = UNATTENDED_SECONDS
TIDYING_SECONDS = 30.0
_QUIET, _AGAIN = 5.0, 60.0  # seconds of waiting before the first word, and between further ones
DEFAULT_TIMEOUT = 60.0
_CONNECT = 10.0
_installed: float | None = None
_FIRST_WAIT, _MOST_WAIT = 0.3, 8.0
_LONGEST_ASKED = 300.0  # a server may ask for an hour: look again sooner, the quota may have been raised
_BUSY = (409, 412, 423, 425, 429)
_LOST = (408, 500, 502, 503, 504, 520, 521, 522, 523, 524)
_TOKEN = re.compile(r"hf_[A-Za-z0-9]{4,}")
_ABOUT = re.compile(r"about (\d+|an?) (second|minute|hour)", re.IGNORECASE)
_UNIT = {"second": 1.0, "minute": 60.0, "hour": 3600.0}


class Outcome(Enum):
    """What a failed request did on the server."""

    BUSY = "nothing was done; try again"
    LOST = "unknown; it may have been done"
    FINAL = "nothing was done, and trying again will not help"


@dataclass(frozen=True)
class Diagnosis:
    """An error's outcome, and the seconds that the server asks to wait (None where it does not say)."""

    outcome: Outcome
    wait: float | None = None


class DamagedDownloadError(Exception):
    """What arrived is not what the Hub says the file is; another download may be whole."""


def diagnose(error: BaseException) -> Diagnosis:
    """What a client error means for the request."""
    error = _cause(error)
    if isinstance(error, (OfflineModeIsEnabled, LocalTokenNotFoundError)):
        return Diagnosis(Outcome.FINAL)
    if isinstance(error, RevisionNotFoundError):
        return Diagnosis(Outcome.LOST)  # heads read back may lag: a commit that was just named is not everywhere yet
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code if error.response is not None else None
        if status in _BUSY:
            return Diagnosis(Outcome.BUSY, _asked_wait(error))
        if status in _LOST:
            return Diagnosis(Outcome.LOST, _asked_wait(error))
        return Diagnosis(Outcome.FINAL)
    if isinstance(error, (httpx.TransportError, httpx.DecodingError, httpx.StreamError)):
        return Diagnosis(Outcome.LOST)
    if isinstance(error, (DamagedDownloadError, ConnectionError, TimeoutError)):
        return Diagnosis(Outcome.LOST)
    return Diagnosis(Outcome.FINAL)


class Patience:
    """Repeats requests until they succeed, fail for good, or a time has passed.

    Args:
        seconds: how long one request is repeated; infinity: as long as it takes.
        clock, sleep: a test passes its own.
    """

    def __init__(
        self,
        seconds: float = DEFAULT_PATIENCE,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.seconds = seconds
        self._clock = clock
        self.sleep = sleep

    def call(self, what: str, request: Callable[[], T], *, seconds: float | None = None) -> T:
        """The result of `request`.

        Args:
            what: completes "Could not ...", for errors.
            seconds: instead of the general patience.

        Raises:
            MailboxUnavailableError: the time has passed.
            MailboxError: repeating will not help; the message says what will.
            FedFSTQError: raised by `request` itself, passed on at once.
        """
        patience = self.seconds if seconds is None else seconds
        begun = self._clock()
        give_up, speak_at = begun + patience, begun + _QUIET
        attempt = 0
        while True:
            try:
                return request()
            except FedFSTQError:
                raise
            except HFValidationError as invalid:
                raise MailboxError(f"Could not {what}: {invalid}") from None
            except Exception as raised:
                error = _cause(raised)
                diagnosis = diagnose(error)
                if diagnosis.outcome is Outcome.FINAL:
                    if _is_foreign(error):
                        raise  # with its own type and traceback
                    raise MailboxError(f"Could not {what}: {explain(error)}") from None
                now, wait = self._clock(), self._wait(attempt, diagnosis.wait)
                if now >= give_up or (diagnosis.wait is None and now + wait > give_up):
                    raise MailboxUnavailableError(
                        f"Could not {what} for {patience:.0f} s; the last answer was: {explain(error)} "
                        "Nothing is lost: start again later."
                    ) from None
                wait = min(wait, give_up - now)  # who asks for an hour is asked once more at the end
                if now + wait >= speak_at:
                    speak_at = now + wait + _AGAIN
                    until = "until that works" if give_up == math.inf else f"for up to {give_up - now:.0f} s more"
                    logger.warning("Could not %s: %s Waiting %s.", what, explain(error), until)
                else:
                    logger.debug("Could not %s (%s); trying again in %.1f s.", what, explain(error), wait)
                self.sleep(wait)
                attempt += 1

    def _wait(self, attempt: int, asked: float | None) -> float:
        if asked is not None:
            return min(asked, _LONGEST_ASKED) + random.uniform(0.0, 1.0)
        most = min(_FIRST_WAIT * 2.0 ** min(attempt, 10), _MOST_WAIT)
        return random.uniform(_FIRST_WAIT / 2, max(most, _FIRST_WAIT))  # full jitter: equals must not stay in step


def explain(error: BaseException) -> str:
    """An error in words, with what to type where that is known. No token ever appears in it."""
    if isinstance(error, OfflineModeIsEnabled):
        return "offline mode is on. Unset HF_HUB_OFFLINE, or give a folder instead of an hf:// address."
    if isinstance(error, LocalTokenNotFoundError):
        return "there is no Hub token here. Type `hf auth login`, or set HF_TOKEN."
    if isinstance(error, httpx.TimeoutException):
        return "the Hub did not answer in time."
    if isinstance(error, (httpx.TransportError, ConnectionError)):
        return f"the Hub could not be reached ({_clean(str(error)) or type(error).__name__})."
    if isinstance(error, HfHubHTTPError):
        return _explain_status(error)
    return _clean(str(error)) or type(error).__name__


def _explain_status(error: HfHubHTTPError) -> str:
    said = _clean(error.server_message or str(error)).rstrip(".")
    status = error.response.status_code if error.response is not None else 0
    if isinstance(error, GatedRepoError):
        return f"{said}. The repo is gated: ask for access on its page, with the account of this token."
    if isinstance(error, DisabledRepoError):
        return f"{said}. The repo was disabled by the Hub."
    if status == 401:
        return f"{said}. The Hub does not accept the token: type `hf auth login`, or set HF_TOKEN to a valid one."
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"{said}. There is no such repo, or this token may not see it: check the address, and type `hf auth "
            "login` (or set HF_TOKEN) with an account of the organisation."
        )
    if status == 402 or "quota" in said.lower() or "storage" in said.lower():
        return f"{said}. Free space in the account, or make the repos public; nothing was lost."
    if status == 403:
        return (
            f"{said}. The token may not do that: it needs write permission there (for a client: a role of "
            "contributor or more in the organisation)."
        )
    return f"HTTP {status}: {said}." if status else f"{said}."


def _asked_wait(error: HfHubHTTPError) -> float | None:
    """The wait that the answer asks for: a rate limit header, Retry-After, or words."""
    headers = error.response.headers
    limit = parse_ratelimit_headers(headers)
    if limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    if headers.get("Retry-After", "").isdigit():
        return float(headers["Retry-After"])
    words = _ABOUT.search(error.server_message or "")
    if words is None:
        return None
    count = 1.0 if words[1].startswith("a") else float(words[1])
    return count * _UNIT[words[2].lower()]


def _cause(error: BaseException) -> BaseException:
    """The client wraps what happens in an upload in a RuntimeError."""
    while type(error) is RuntimeError and error.__cause__ is not None:
        error = error.__cause__
    return error


def _is_foreign(error: BaseException) -> bool:
    """A bug or a full disk, not an answer of the Hub: it keeps its own type and traceback."""
    return not isinstance(error, (HfHubHTTPError, OfflineModeIsEnabled, LocalTokenNotFoundError, httpx.HTTPError))


def _clean(text: str) -> str:
    return " ".join(_TOKEN.sub("hf_***", text).split())


# -- timeouts -------------------------------------------------------------------------------------------------------


class _TimedClient(httpx.Client):
    """A client for which `timeout=None` in a call, as the Hub client passes it, means the client's own timeout."""

    def request(self, *args: Any, **kwargs: Any) -> httpx.Response:
        return super().request(*args, **self._timed(kwargs))

    def stream(self, *args: Any, **kwargs: Any) -> Any:
        return super().stream(*args, **self._timed(kwargs))

    def _timed(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        if kwargs.get("timeout", ...) is None:
            del kwargs["timeout"]
        return kwargs


def timeout_seconds() -> float:
    """Seconds to wait for an answer: `FEDFSTQ_HUB_TIMEOUT`, or 60."""
    try:
        return float(os.environ["FEDFSTQ_HUB_TIMEOUT"])
    except (KeyError, ValueError):
        return DEFAULT_TIMEOUT


def request_timeout(seconds: float | None = None) -> httpx.Timeout:
    """The timeout of one request, of `timeout_seconds()` where none is given."""
    seconds = timeout_seconds() if seconds is None else seconds
    return httpx.Timeout(seconds, connect=min(seconds, _CONNECT))


def install_timeouts() -> None:
    """Give this process's Hub client a default timeout. It touches only requests that have none of their own."""
    global _installed
    seconds = timeout_seconds()
    if _installed != seconds:
        hooks = get_session().event_hooks  # the Hub client's own
        huggingface_hub.set_client_factory(
            lambda: _TimedClient(follow_redirects=True, timeout=request_timeout(), event_hooks=hooks)
        )
        _installed = seconds
