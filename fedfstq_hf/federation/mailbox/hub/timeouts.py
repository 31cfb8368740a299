"""A timeout on every request. The Hub client's own default is none, and a silent server would hang it for ever."""

from __future__ import annotations

import os
from typing import Any

import httpx2
import huggingface_hub
from huggingface_hub.utils._http import hf_request_event_hook

DEFAULT_TIMEOUT = 60.0
_CONNECT = 10.0
_installed: float | None = None


class _TimedClient(httpx2.Client):
    """A client for which `timeout=None` in a call, as the Hub client passes it, means the client's own timeout."""

    def request(self, *args: Any, **kwargs: Any) -> httpx2.Response:
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


def request_timeout(seconds: float | None = None) -> httpx2.Timeout:
    """The timeout of one request, of `timeout_seconds()` where none is given."""
    seconds = timeout_seconds() if seconds is None else seconds
    return httpx2.Timeout(seconds, connect=min(seconds, _CONNECT))


def install_timeouts() -> None:
    """Give this process's Hub client a default timeout. It touches only requests that have none of their own."""
    global _installed
    seconds = timeout_seconds()
    if _installed != seconds:
        huggingface_hub.set_client_factory(
            lambda: _TimedClient(
                follow_redirects=True, timeout=request_timeout(), event_hooks={"request": [hf_request_event_hook]}
            )
        )
        _installed = seconds
