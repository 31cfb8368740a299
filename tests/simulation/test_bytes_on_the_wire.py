"""A simulated federation counts the bytes that one of real clients sends: empty previews are sent by neither."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "federation"))

from light import SCHEMA, LightClient, found, pause, run_rounds
from test_participation import CLIENTS, Run, plan_of

from fedfstq_hf.codec.budget import MessageBudget
from fedfstq_hf.federation import history
from fedfstq_hf.federation.client.participation import MailboxParticipation
from fedfstq_hf.federation.client.session import Caps, ClientSession
from fedfstq_hf.federation.server.coordinator import Coordinator
from fedfstq_hf.simulation.workers import client_name

PREVIEW, REFINEMENT, ROUNDS = 400, 480, 3
REFINED = {
    "codec": "topk",
    "uplink_budget": PREVIEW,
    "refinement_budget": REFINEMENT,
    "preview_step": 0.5,
    "error_feedback": 0.0,
    "rounds": ROUNDS,
}
SILENT = Caps(first=1)


class Client(LightClient):
    """A client whose previews are capped; both its messages have arrived when `step` returns."""

    def __init__(self, mailbox, client_id, caps):
        super().__init__(mailbox, client_id, None)
        self.session = ClientSession(client_id, self.session.spec, SCHEMA, caps=caps)
        self.participation = MailboxParticipation(
            mailbox,
            self.session,
            budget=MessageBudget(fixed=PREVIEW),
            refinements=MessageBudget(fixed=REFINEMENT),
            sleep=pause,
        )
        self.logged = []
        complete = self.participation.complete
        self.participation.complete = lambda *args: self.logged.append(complete(*args)) or self.logged[-1]

    def step(self):
        happened = super().step()
        self.participation.uplink.background.wait()
        return happened


def simulated(folder, caps):
    run = Run(folder, plan_of(*[((0, 1, 2), (0, 1, 2))] * ROUNDS), **REFINED)
    run.participation._caps = [*caps, *[Caps()] * (CLIENTS - len(caps))]
    run.finish()
    return run


def real(folder, caps, min_clients):
    mailbox = found(folder, min_clients=min_clients, **REFINED)
    clients = [Client(mailbox, client_name(index), own) for index, own in enumerate(caps)]
    coordinator = Coordinator(mailbox)
    run_rounds(coordinator, clients)
    return coordinator, clients


@pytest.mark.parametrize("caps", [(Caps(),) * 3, (SILENT, Caps(), Caps()), (SILENT,) * 3])
def test_simulated_and_real_clients_send_the_same_bytes(tmp_path, caps):
    run = simulated(tmp_path / "simulated", caps)
    coordinator, clients = real(tmp_path / "real", caps, min_clients=3)
    sent = [sum(client.logged[round]["fed_uplink_bytes"] for client in clients) for round in range(ROUNDS)]
    assert [row["uplink_bytes"] for row in run.rows[1:]] == sent
    rows = history.complete(lambda name: None, ROUNDS, coordinator._record)
    assert sum(row.uplink_bytes for row in rows) == sum(sent) == run.rows[-1]["cumulative_uplink_bytes"]
    assert torch.equal(coordinator.adapter, run.participation.final_adapter())


def test_a_client_with_nothing_to_say_yet_sends_its_refinement_alone(tmp_path, caplog):
    coordinator, clients = real(tmp_path, (SILENT, Caps()), min_clients=2)
    mailbox = coordinator.mailbox
    for round in range(ROUNDS - 1):
        assert [ref.client_id for ref in mailbox.list_updates(round)] == [client_name(1)]
        assert len(mailbox.list_updates(round, refinements=True)) == 2
    assert len(mailbox.list_updates(ROUNDS - 1)) == 2  # the last round has one message of everyone
    assert [s.outcome for s in clients[0].participation.settlements] == ["follows", "follows", "accepted"]
    assert [s.outcome for s in clients[1].participation.settlements] == ["accepted"] * 3
    assert all(client.done for client in clients)
    assert not caplog.text


def test_a_round_waits_for_the_refinement_of_who_has_nothing_to_say_yet(tmp_path):
    """`min_clients` are those that took part, whatever they could say by then."""
    mailbox = found(tmp_path, min_clients=2, **REFINED)
    speaks, silent = Client(mailbox, "a", Caps()), Client(mailbox, "b", SILENT)
    coordinator = Coordinator(mailbox)
    speaks.step()
    assert not coordinator.ready()
    assert coordinator.close_round() is None
    silent.step()
    assert coordinator.ready()
    assert [entry.client_id for entry in coordinator.close_round().accepted] == ["a"]


def test_a_refinement_that_is_rubbish_closes_no_round(tmp_path):
    mailbox = found(tmp_path, min_clients=2, **REFINED)
    Client(mailbox, "a", Caps()).step()
    mailbox.post_update(0, "b", b"rubbish", refinement=True)
    coordinator = Coordinator(mailbox)
    assert coordinator.close_round() is None
    assert not coordinator.ready()  # it is not looked at again
    Client(mailbox, "c", SILENT).step()
    assert coordinator.ready()
    assert coordinator.close_round().round == 1
