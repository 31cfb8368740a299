"""The HTTP side of the loopback Hub: two threaded HTTP/1.1 servers, the Hub and its object storage."""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.loopback_hub import (  # noqa: F401 - importing a module of routes registers them
    routes_accounts,
    routes_admin,
    routes_commit,
    routes_discussions,
    routes_files,
    routes_repositories,
    routes_storage,
    routes_tree,
)
from tests.loopback_hub.errors import HubError
from tests.loopback_hub.faults import corrupted
from tests.loopback_hub.log import Entry
from tests.loopback_hub.state import HubState
from tests.loopback_hub.wire import HUB, STORAGE, Request, Response, answer_error, dispatch


class Server(ThreadingHTTPServer):
    """One origin on a port of its own."""

    daemon_threads = True
    request_queue_size = 256
    block_on_close = False

    def __init__(self, hub: HubState, origin: str, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.hub, self.origin = hub, origin
        self._connections: set[socket.socket] = set()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def close(self) -> None:
        """Stop listening and drop every connection, as if the machine went away."""
        self.shutdown()
        self.server_close()
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away in the middle are part of the tests; anything else is a bug worth seeing."""
        if not isinstance(sys.exception(), (ConnectionError, TimeoutError)):
            traceback.print_exc()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "loopback-hub", ""
    disable_nagle_algorithm = True
    wbufsize = 1 << 16
    server: Server

    def handle_request(self) -> None:
        """Read, log and answer one request, with the fault it is due."""
        start, hub = time.monotonic(), self.server.hub
        body = self._read_body()
        target = urlsplit(self.path)
        request = Request(
            method=self.command,
            path=target.path,
            query=parse_qs(target.query, keep_blank_values=True),
            headers=self.headers,
            body=body,
            origin=self.server.origin,
            host=self.headers.get("Host", ""),
        )
        fault = None
        try:
            if request.path.startswith("/_admin/"):
                response = dispatch(hub, request)
            else:
                if request.origin == HUB:
                    request.token = hub.accounts.identify(self.headers.get("Authorization"))
                fault = hub.faults.choose(request, self.path)
                response = self._answer(request, fault)
        except HubError as error:
            response = answer_error(error)
        except Exception as error:
            traceback.print_exc()
            response = answer_error(HubError(500, f"{type(error).__name__}: {error}"))
        if fault == "corrupt":
            response.body = corrupted(response.body)
        closed = fault in ("hang", "lost")
        size = 0 if closed or self.command == "HEAD" else len(response.body)
        if not request.path.startswith("/_admin/"):
            hub.log.add(
                Entry(
                    time=time.time(),
                    seconds=time.monotonic() - start,
                    origin=request.origin,
                    method=request.method,
                    path=self.path,
                    status=0 if closed else response.status,
                    user=request.user,
                    fault=fault,
                    received=len(body),
                    sent=size // 2 if fault == "cut" else size,
                )
            )
        if closed:
            self._close()
        else:
            self._send(response, cut=fault == "cut")

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    def _answer(self, request: Request, fault: str | None) -> Response:
        hub = self.server.hub
        hub.faults.refuse(fault)
        if fault == "hang":
            time.sleep(hub.faults.hang_seconds)
            return Response()
        if fault == "stale":
            request.back = 1
        response = dispatch(hub, request)
        if fault == "500-after":
            raise HubError(500, "Internal Error - We're working hard to fix this as soon as possible!")
        return response

    def _send(self, response: Response, cut: bool) -> None:
        self.send_response(response.status)
        for name, value in response.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(response.body)))
        self.send_header("X-Request-Id", self.headers.get("X-Amzn-Trace-Id") or "loopback")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(response.body[: len(response.body) // 2] if cut else response.body)
        self.wfile.flush()
        if cut:
            self._close()

    def _close(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def _read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length)
            if len(body) < length:
                raise ConnectionResetError("the client went away in the middle of its request")
            return body
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():  # trailers
            pass
        return b"".join(chunks)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr: the request log holds it."""


@dataclass
class RunningServers:
    """Both origins, served by threads of this process."""

    hub: Server
    storage: Server

    def close(self) -> None:
        self.hub.close()
        self.storage.close()


def serve(state: HubState, port: int = 0) -> RunningServers:
    """Start both origins on free ports (the Hub on `port` if given)."""
    running = RunningServers(Server(state, HUB, port), Server(state, STORAGE))
    state.storage_endpoint = running.storage.endpoint
    for server in (running.hub, running.storage):
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    return running


def describe(state: HubState, running: RunningServers) -> str:
    """One line of JSON for whoever started this process."""
    return json.dumps({"endpoint": running.hub.endpoint, "admin_token": state.admin_token})
