"""A federation on the loopback Hub, its coordinator and clients in this process, each with a token of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedfstq_hf.federation.mailbox.hub.mailbox import HubMailbox
from fedfstq_hf.federation.server.coordinator import Coordinator
from tests.federation.light import LightClient, found_in
from tests.loopback_hub.loopback import LoopbackHub

LAYOUTS = ("own", "shared", "pull-request")
CLIENTS = ("a", "b", "c")
# layout -> the token's role and the account's role in the organisation, the least that do
ROLES = {"own": ("contributor", None), "shared": ("write", None), "pull-request": ("write", "read")}


class HubFederation:
    """`org/run`, founded by `owner`, for the clients a, b and c; or another of the organisation."""

    def __init__(
        self, hub: LoopbackHub, layout: str, *, org: bool = True, address: str = "hf://org/run", **changes: object
    ) -> None:
        self.hub, self.address = hub, address
        if org:
            hub.org("org")
        self.owner = hub.user("owner", "write", org="org")
        role, member = ROLES[layout]
        self.tokens = {name: hub.user(f"user-{name}", role, org="org", member=member) for name in CLIENTS}
        mailbox = self.mailbox(self.owner, create=True, layout=layout)
        settings: dict[str, object] = {"codec": "fp32", "min_clients": 3, "rounds": 3}
        found_in(mailbox, **(settings | changes))

    def mailbox(self, token: str, **options: Any) -> HubMailbox:
        return HubMailbox(self.address, token=token, patience=20.0, **options)

    def coordinator(self) -> Coordinator:
        return Coordinator(self.mailbox(self.owner), clock=lambda: 0.0)

    def client(self, name: str, folder: Path | None = None) -> LightClient:
        return LightClient(self.mailbox(self.tokens[name]), name, folder)

    def records(self) -> list[dict[str, Any]]:
        """The records of rounds 1, 2, ... as published."""
        newest = json.loads(self.hub.read("org/run", "fedfstq/round.json"))["round"]
        return [
            json.loads(self.hub.read("org/run", f"fedfstq/rounds/{round:06d}/round.json"))
            for round in range(1, newest + 1)
        ]
