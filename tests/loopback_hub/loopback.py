"""A loopback Hub to hold in a test: in this process, or as a process of its own with the same calls."""

from __future__ import annotations

import http.client
import itertools
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.loopback_hub import rpc
from tests.loopback_hub.control import Control
from tests.loopback_hub.faults import Faults
from tests.loopback_hub.log import RequestLog
from tests.loopback_hub.server import serve
from tests.loopback_hub.state import HubState

CHECKOUT = Path(__file__).parents[2]
_FOREIGN = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_TOKEN_PATH", "TRANSFORMERS_OFFLINE", "HF_ASSETS_CACHE")


class _Homes:
    """Gives every client a Hugging Face home of its own."""

    endpoint: str

    def __init__(self, folder: Path | None) -> None:
        self._temporary = None if folder else tempfile.TemporaryDirectory(prefix="loopback-hub-")
        self._folder = folder or Path(self._temporary.name if self._temporary else "")
        self._count = itertools.count()

    def env(self, token: str | None = None, **more: str) -> dict[str, str]:
        """The whole environment for a process that takes this for the Hub: fresh cache, Xet and telemetry off."""
        home = self._folder / f"home-{next(self._count)}"
        home.mkdir(parents=True)
        environment = {name: value for name, value in os.environ.items() if name not in (*_FOREIGN, "HF_TOKEN")}
        environment |= {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
            "PYTHONPATH": str(CHECKOUT),
        }
        if token is not None:
            environment["HF_TOKEN"] = token
        return environment | more

    def close(self) -> None:
        if self._temporary:
            self._temporary.cleanup()


class LoopbackHub(_Homes, Control):
    """Served by threads of this process. `faults`, `log` and `settings` are the live objects."""

    def __init__(self, folder: Path | None = None, port: int = 0) -> None:
        _Homes.__init__(self, folder)
        Control.__init__(self, HubState())
        self.servers = serve(self.state, port)
        self.endpoint = self.servers.hub.endpoint
        self.faults, self.log, self.settings = self.state.faults, self.state.log, self.state.settings

    def close(self) -> None:
        self.servers.close()
        super().close()


class RemoteHub(_Homes):
    """A loopback Hub in another process: every method of `Control`, `Faults` and `RequestLog`, by HTTP.

    Change faults by `faults.configure(commit_seconds=0.3)`, not by setting attributes, and sizes by
    `configure(tree_page=3)`.
    """

    def __init__(self, endpoint: str, admin_token: str, folder: Path | None = None) -> None:
        super().__init__(folder)
        self.endpoint, self._admin_token = endpoint, admin_token
        self._process: subprocess.Popen[str] | None = None
        self.faults: Faults = _Remote(self, "faults")  # type: ignore[assignment]
        self.log: RequestLog = _Remote(self, "log")  # type: ignore[assignment]

    @classmethod
    def start(cls, folder: Path | None = None) -> RemoteHub:
        """Start `python -m tests.loopback_hub` and attach to it; `close` ends it."""
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.loopback_hub", "--until-stdin-closes"],
            cwd=CHECKOUT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        line = process.stdout.readline() if process.stdout else ""
        if not line:
            raise RuntimeError(f"the loopback Hub ended with status {process.wait()}")
        described = rpc.loads(line.encode())
        hub = cls(described["endpoint"], described["admin_token"], folder)
        hub._process = process
        return hub

    def call(self, on: str, method: str, /, *args: Any, **kwargs: Any) -> Any:
        """The result of a method there. ValueError with the server's words if it raised."""
        connection = http.client.HTTPConnection(urlsplit(self.endpoint).netloc, timeout=60)
        body = rpc.dumps({"on": on, "method": method, "args": args, "kwargs": kwargs})
        connection.request("POST", "/_admin/call", body, {"Authorization": f"Bearer {self._admin_token}"})
        answer = connection.getresponse()
        content = rpc.loads(answer.read())
        connection.close()
        if answer.status != 200:
            raise ValueError(f"{on}.{method}: {content['error']}")
        return content

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not callable(getattr(Control, name, None)):
            raise AttributeError(name)
        return lambda *args, **kwargs: self.call("control", name, *args, **kwargs)

    def close(self) -> None:
        if self._process:
            self._process.terminate()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe:
                    pipe.close()
        super().close()


class _Remote:
    def __init__(self, hub: RemoteHub, on: str) -> None:
        self._hub, self._on = hub, on

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: self._hub.call(self._on, name, *args, **kwargs)
