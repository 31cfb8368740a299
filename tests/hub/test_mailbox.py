"""Federations on the loopback Hub: the real client, real sessions, codec and coordinator, in each layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedfstq_hf.federation import adapter_file
from fedfstq_hf.federation.coordinator import Coordinator
from fedfstq_hf.federation.founding import found_federation
from fedfstq_hf.federation.hub.mailbox import HubMailbox
from tests.federation.light import LightClient, found, initial_state, make_spec, run_rounds
from tests.hub.loopback import LoopbackHub

LAYOUTS = ("own", "shared", "pull-request")
CLIENTS = ("a", "b", "c")


class HubFederation:
    """A coordinator and clients with a token each, all in this process."""

    def __init__(self, hub: LoopbackHub, layout: str, **changes: object) -> None:
        self.hub = hub
        hub.org("org")
        self.address = "hf://org/run"
        self.owner = hub.user("owner", "write", org="org")
        token, member = {"own": ("contributor", None), "shared": ("write", None), "pull-request": ("write", "read")}[
            layout
        ]
        self.tokens = {name: hub.user(f"user-{name}", token, org="org", member=member) for name in CLIENTS}
        mailbox = self.mailbox(self.owner, create=True, layout=layout)
        settings = {"codec": "fp32", "min_clients": 3, "rounds": 3} | changes
        found_federation(mailbox, make_spec(**settings), adapter_file.dump(initial_state()), b"{}\n", now=0.0)

    def mailbox(self, token: str, **options: object) -> HubMailbox:
        return HubMailbox(self.address, token=token, patience=20.0, **options)

    def coordinator(self) -> Coordinator:
        return Coordinator(self.mailbox(self.owner), clock=lambda: 0.0)

    def client(self, name: str, folder: Path | None = None) -> LightClient:
        return LightClient(self.mailbox(self.tokens[name]), name, folder)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_federation_gives_the_adapter_of_the_folder_mailbox(
    hub_here: LoopbackHub, tmp_path: Path, layout: str
) -> None:
    federation = HubFederation(hub_here, layout, id="same")
    run_rounds(federation.coordinator(), [federation.client(name) for name in CLIENTS])

    folder = found(tmp_path / "folder", codec="fp32", min_clients=3, rounds=3, id="same")
    run_rounds(Coordinator(folder, clock=lambda: 0.0), [LightClient(folder, name, None) for name in CLIENTS])
    assert hub_here.read("org/run", "adapter_model.safetensors") == folder.read_root("adapter_model.safetensors")
    record = json.loads(hub_here.read("org/run", "fedfstq/round.json"))
    assert (record["round"], record["finished"], len(record["accepted"])) == (3, True, 3)
