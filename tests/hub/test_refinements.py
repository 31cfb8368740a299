"""Refinements on the loopback Hub: beside messages in each layout, and the same adapter as in a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedfstq_hf.codec.budget import MessageBudget
from fedfstq_hf.errors import UpdateConflictError
from fedfstq_hf.federation.client.participation import MailboxParticipation
from fedfstq_hf.federation.mailbox.protocol import Mailbox
from fedfstq_hf.federation.server.coordinator import Coordinator
from tests.federation.light import LightClient, found, pause, run_rounds
from tests.loopback_hub.federation import CLIENTS, LAYOUTS, HubFederation
from tests.loopback_hub.loopback import LoopbackHub

ADAPTER = "adapter_model.safetensors"
REFINED = {
    "codec": "topk",
    "min_clients": 3,
    "rounds": 3,
    "refinement_budget": 480,
    "preview_step": 0.5,
    "error_feedback": 0.0,
}


def refining(client: LightClient) -> LightClient:
    """With budgets for both messages; `step` returns when both are sent."""
    client.participation = MailboxParticipation(
        client.participation.mailbox,
        client.session,
        budget=MessageBudget(fixed=400),
        refinements=MessageBudget(fixed=480),
        sleep=pause,
    )
    return client


def listed(mailbox: Mailbox, round: int, *, refinements: bool) -> list[tuple[str, int, int, bool, bytes]]:
    """Each message with its bytes."""
    return [
        (ref.client_id, ref.round, ref.num_bytes, ref.refinement, mailbox.read_update(ref, max_bytes=9999))
        for ref in mailbox.list_updates(round, CLIENTS, refinements=refinements)
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_messages_of_a_round_are_posted_listed_and_read(hub_here: LoopbackHub, layout: str) -> None:
    federation = HubFederation(hub_here, layout, **REFINED)
    for name in "ab":
        federation.mailbox(federation.tokens[name]).post_update(0, name, b"first of " + name.encode())
    late = federation.mailbox(federation.tokens["b"])
    for _ in range(2):  # posted again: the same bytes change nothing
        late.post_update(0, "b", b"second one of b", refinement=True)
    mailbox = federation.mailbox(federation.owner)
    assert listed(mailbox, 0, refinements=False) == [
        ("a", 0, 10, False, b"first of a"),
        ("b", 0, 10, False, b"first of b"),
    ]
    assert listed(mailbox, 0, refinements=True) == [("b", 0, 15, True, b"second one of b")]
    assert [listed(mailbox, 1, refinements=second) for second in (False, True)] == [[], []]
    with pytest.raises(UpdateConflictError, match="second process"):
        late.post_update(0, "b", b"something else", refinement=True)


def test_where_they_lie(hub_here: LoopbackHub) -> None:
    federation = HubFederation(hub_here, "own", **REFINED)
    own = federation.mailbox(federation.tokens["a"])
    own.post_update(12, "a", b"first")
    own.post_update(12, "a", b"second", refinement=True)
    messages = ["refinements/000012.safetensors", "rounds/000012.safetensors"]
    assert hub_here.files("org/run-a") == [".fedfstq.json", *messages]
    assert [commit["title"] for commit in hub_here.commits("org/run-a")][:2] == ["Round 12, refinement", "Round 12"]


def test_where_they_lie_in_a_shared_repo(hub_here: LoopbackHub) -> None:
    federation = HubFederation(hub_here, "shared", **REFINED)
    mailbox = federation.mailbox(federation.tokens["a"])
    mailbox.post_update(12, "a", b"first")
    mailbox.post_update(12, "a", b"second", refinement=True)
    folder = "rounds/000012"
    assert hub_here.files("org/run-mailbox") == [
        ".fedfstq.json",
        f"{folder}/deltas/a.safetensors",
        f"{folder}/refinements/a.safetensors",
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_federation_gives_the_adapter_of_the_folder_mailbox(
    hub_here: LoopbackHub, tmp_path: Path, layout: str
) -> None:
    federation = HubFederation(hub_here, layout, salt="same", **REFINED)
    run_rounds(federation.coordinator(), [refining(federation.client(name)) for name in CLIENTS])

    folder = found(tmp_path / "folder", salt="same", **REFINED)
    run_rounds(Coordinator(folder, clock=lambda: 0.0), [refining(LightClient(folder, name, None)) for name in CLIENTS])
    assert hub_here.read("org/run", ADAPTER) == folder.read_root(ADAPTER)
    records = federation.records()
    assert [
        [len(record.get(key, ())) for key in ("accepted", "refinements", "refused", "late")] for record in records
    ] == [
        [3, 0, 0, 0],
        [3, 3, 0, 0],
        [3, 3, 0, 0],
    ]


def test_a_coordinator_that_is_started_anew_finds_both_messages_of_the_last_round(hub_here: LoopbackHub) -> None:
    federation = HubFederation(hub_here, "own", **REFINED)
    members = [refining(federation.client(name)) for name in CLIENTS]
    for _ in range(3):
        for member in members:
            member.step()
        assert federation.coordinator().close_round() is not None
    assert [len(record.get("refinements", ())) for record in federation.records()] == [0, 3, 3]


def test_old_refinements_of_a_shared_repo_are_removed_with_their_messages(hub_here: LoopbackHub) -> None:
    federation = HubFederation(hub_here, "shared", **(REFINED | {"rounds": 12, "min_clients": 1}))
    run_rounds(federation.coordinator(), [refining(federation.client("a"))])
    kept = {path.split("/")[1] for path in hub_here.files("org/run-mailbox") if path.startswith("rounds/")}
    assert kept == {f"{round:06d}" for round in range(7, 12)}  # what was still wanted in round 10
    assert [len(record.get("refinements", ())) for record in federation.records()] == [0, *[1] * 11]


def test_a_refinement_that_opens_the_pull_request_is_no_preview(hub_here: LoopbackHub) -> None:
    """As where the preview could not be sent before its round was closed."""
    federation = HubFederation(hub_here, "pull-request", **REFINED)
    federation.mailbox(federation.tokens["a"]).post_update(0, "a", b"second", refinement=True)
    mailbox = federation.mailbox(federation.owner)
    assert listed(mailbox, 0, refinements=False) == []
    assert listed(mailbox, 0, refinements=True) == [("a", 0, 6, True, b"second")]
