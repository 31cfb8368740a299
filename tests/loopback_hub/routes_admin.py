"""The door for tests in other processes: calls of control, faults and log, for the holder of the admin token."""

from __future__ import annotations

import hmac

from tests.loopback_hub import rpc
from tests.loopback_hub.control import Control
from tests.loopback_hub.errors import HubError
from tests.loopback_hub.state import HubState
from tests.loopback_hub.wire import Request, Response, route


@route("POST", "/_admin/call")
def call(hub: HubState, request: Request) -> Response:
    """Body {"on": control, faults or log, "method", "args", "kwargs"}; the answer is what the method returns."""
    given = (request.headers.get("Authorization") or "").removeprefix("Bearer ")
    if not hmac.compare_digest(given, hub.admin_token):
        raise HubError(401, "Invalid admin token")
    asked = rpc.loads(request.body)
    target = {"control": Control(hub), "faults": hub.faults, "log": hub.log}.get(asked["on"])
    method = None if asked["method"].startswith("_") else getattr(target, asked["method"], None)
    if not callable(method):
        raise HubError(404, f"No call {asked['on']}.{asked['method']}")
    try:
        result = method(*asked.get("args", ()), **asked.get("kwargs", {}))
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise HubError(400, f"{type(error).__name__}: {error}") from error
    return Response(200, rpc.dumps(result), {"Content-Type": "application/json"})
