"""Two coordinators of one federation on the Hub: a round is published once, an update counted once."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable

import pytest

from fedfstq_hf.errors import MailboxError, RoundConflictError
from fedfstq_hf.federation.control import change_control, pause, resume
from fedfstq_hf.federation.server.coordinator import Coordinator
from tests.loopback_hub.federation import CLIENTS, HubFederation
from tests.loopback_hub.loopback import LoopbackHub

BESIDE = ("refresh", "metric", "control", "look")
STEPS = ("client", "client", "client", "close", "race", "race", *BESIDE)


def beside(coordinator: Coordinator, what: str, number: int) -> None:
    """A commit, or a look, that leaves the rounds alone."""
    if what == "refresh":
        coordinator.refresh()
    elif what == "metric":
        coordinator.mailbox.post_metric(0, f"set-{number}", {"loss": 1.0})
    elif what == "control":
        change_control(coordinator.mailbox, pause("a moment"))
        change_control(coordinator.mailbox, resume)
    elif what == "look":
        coordinator.mailbox.head()


def between_collecting_and_publishing(coordinator: Coordinator, act: Callable[[], None]) -> None:
    """`act` happens once, when the coordinator has made its next round and not yet sent it."""
    mailbox, publish = coordinator.mailbox, coordinator.mailbox.publish

    def later(*arguments: object) -> None:
        mailbox.publish = publish
        act()
        publish(*arguments)

    mailbox.publish = later


@pytest.mark.parametrize("seed", range(8))
def test_any_interleaving(hub_here: LoopbackHub, seed: int) -> None:
    draw, hub = random.Random(seed), hub_here
    run = HubFederation(hub, "own", rounds=6, min_clients=1)
    pair = [run.coordinator(), run.coordinator()]
    clients = {name: run.client(name) for name in CLIENTS}

    def close(coordinator: Coordinator) -> None:
        if not coordinator.finished and coordinator.ready():
            with contextlib.suppress(MailboxError):
                coordinator.close_round()

    for number in range(25):
        one, other = draw.sample(pair, 2)
        what = draw.choice(STEPS)
        if what == "client":
            clients[draw.choice(CLIENTS)].step()
        elif what == "close":
            close(one)
        elif what == "race":

            def meanwhile(one: Coordinator = one, other: Coordinator = other, number: int = number) -> None:
                close(other)
                beside(one, draw.choice(BESIDE), number)

            between_collecting_and_publishing(one, meanwhile)
            close(one)
            vars(one.mailbox).pop("publish", None)
        else:
            beside(one, what, number)
    titles = [commit["title"] for commit in hub.commits("org/run") if commit["title"].startswith("Round ")]
    assert len(titles) == len(set(titles))
    used = [
        (update["client_id"], update["sha256"]) for record in run.records() for update in record.get("accepted", ())
    ]
    assert len(used) == len(set(used))


@pytest.mark.parametrize("between", ["refresh", "metric", "control"])
def test_a_commit_beside_the_rounds_does_not_carry_an_old_head_over_a_newer_round(
    hub_here: LoopbackHub, between: str
) -> None:
    """Each of them makes its commit after the other's round; the known head is the one before."""
    run = HubFederation(hub_here, "own", rounds=4, min_clients=1)
    first, second = run.coordinator(), run.coordinator()
    run.client("a").step()
    assert second.close_round() is not None
    if between == "refresh":
        first.refresh()
    elif between == "metric":
        first.mailbox.post_metric(0, "set", {"loss": 1.0})
    else:
        change_control(first.mailbox, pause("a moment"))
        change_control(first.mailbox, resume)
    files = {name: first.mailbox.read(0, name) for name in ("adapter_model.safetensors", "adapter_config.json")}
    with pytest.raises(RoundConflictError):
        first.mailbox.publish(1, files | {"round.json": b"{}"})
    assert [commit["title"] for commit in hub_here.commits("org/run")].count("Round 1") == 1


def test_a_round_is_not_built_on_another_record_of_the_same_number(hub_here: LoopbackHub) -> None:
    run = HubFederation(hub_here, "own", rounds=4, min_clients=1)
    first = run.coordinator()
    run.client("a").step()
    assert first.close_round() is not None
    first.mailbox.head()
    files = {name: first.mailbox.read(1, name) for name in ("adapter_model.safetensors", "adapter_config.json")}
    other = hub_here.read("org/run", "fedfstq/round.json").replace(b'"opened_at":0.0', b'"opened_at":1.0')
    hub_here.write("org/run", {"fedfstq/round.json": other})
    with pytest.raises(RoundConflictError):
        first.mailbox.publish(2, files | {"round.json": b'{"round": 2}'})
