"""A simulated federation's bookkeeping: real sessions, mailbox and coordinator, a training that is a function."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "federation"))

from light import SCHEMA, LightClient, fake_training, found, run_rounds

from fedfstq_hf.errors import FedFSTQError
from fedfstq_hf.federation.server.coordinator import Coordinator
from fedfstq_hf.recipe.network import draw_rates, get_link
from fedfstq_hf.simulation.population import RoundPlan, make_plan
from fedfstq_hf.simulation.simulated_participation import FOUNDED, SimulatedParticipation
from fedfstq_hf.simulation.workers import client_name

CLIENTS = 4


def plan_of(*rounds):
    """Rounds as (sampled, survivors)."""
    return [RoundPlan(number, sampled, survivors) for number, (sampled, survivors) in enumerate(rounds, start=1)]


ALL = ((0, 1), (0, 1))


class Run:
    """Drives a participation as a trainer does; `next` and `finish` may be interleaved with restarts."""

    def __init__(self, folder, plan, loss=(0.0, 0, 0), **spec):
        self.loss = loss
        self.folder, self.plan, self.rows, self.evaluated, self.trained = folder, plan, [], [], []
        if not (folder / "mailbox").exists():
            settings = {"rounds": len(plan), "min_clients": 1, "codec": "topk", "uplink_budget": 400}
            found(folder / "mailbox", now=FOUNDED, **(settings | spec))
        self.restart()

    def restart(self):
        profile = get_link("straggler-tail")
        self.participation = SimulatedParticipation(
            self.folder,
            label={"method": "fstq", "seed": 0},
            plan=self.plan,
            datasets=[[index] * 3 for index in range(CLIENTS)],
            links=[(profile, draw_rates(profile, CLIENTS, 0))],
            evaluate=self.evaluate,
            rows=list(self.rows),
            emit=self.rows.append,
            loss=self.loss,
        )

    def evaluate(self, adapter):
        self.evaluated.append(adapter.clone())
        return {"metric": float(adapter.sum())}

    def step(self):
        """Train one client; False at the end."""
        assignment = self.participation.next()
        if assignment is None:
            return False
        self.trained.append((assignment.round, assignment.session.client_id, assignment.dataset[0]))
        result = fake_training(assignment.adapter, assignment.seed, assignment.session.carried)
        assert self.participation.complete(assignment, result) == {}
        return True

    def finish(self):
        while self.step():
            pass
        return self


def without_clock(rows):
    clock = ("seconds", "compute_seconds", "client_compute_seconds", "energy")
    return [{key: value for key, value in row.items() if key not in clock} for row in rows]


def test_the_survivors_of_the_plan_train_in_order(tmp_path):
    plan = plan_of(((0, 2, 3), (0, 3)), ((1, 2), (2,)))
    run = Run(tmp_path, plan).finish()
    assert run.trained == [(0, "client-0000", 0), (0, "client-0003", 3), (1, "client-0002", 2)]
    assert [row["round"] for row in run.rows] == [0, 1, 2]
    assert [(row["num_updates"], row["num_dropped"]) for row in run.rows] == [(0, 0), (2, 1), (1, 1)]
    assert len(run.evaluated) == 3
    assert torch.equal(run.participation.final_adapter(), run.evaluated[-1])
    assert run.participation.next() is None


def test_it_knows_how_many_steps_are_left(tmp_path):
    plan = plan_of(((0, 2, 3), (0, 3)), ((1, 2), (2,)))
    run = Run(tmp_path, plan, local_steps=5)
    assert run.participation.total_steps == 15
    for _ in range(3):
        run.step()
    run.participation.close()
    run.restart()
    assert run.participation.total_steps == 5


def files_beside(mailbox, plan, round):
    """Bytes of records, and at a client's first contact of the rest of round 0, that a round's clients download."""

    def size(round, name):
        return len(mailbox.read(round, name))

    total = 0
    for index in plan[round].sampled:
        before = [earlier for earlier in range(round) if index in plan[earlier].sampled]
        if not before:
            total += sum(size(0, name) for name in ("spec.json", "adapter_config.json", "round.json"))
        elif before[-1] + 1 < round:
            total += size(before[-1] + 1, "round.json")
        total += size(round, "round.json") if round else 0
    return total


def test_it_is_the_federation_of_real_clients(tmp_path):
    """The same adapter and residuals as MailboxParticipation and Coordinator give, and the bytes that they count."""
    plan = make_plan(CLIENTS, 3, 4, 0.0, 0)
    run = Run(tmp_path / "simulated", plan, server={"optimizer": "SGD", "lr": 0.9, "momentum": 0.5}).finish()
    mailbox = found(
        tmp_path / "real",
        now=FOUNDED,
        uplink_budget=400,
        rounds=4,
        min_clients=3,
        codec="topk",
        server={"optimizer": "SGD", "lr": 0.9, "momentum": 0.5},
    )
    coordinator = Coordinator(mailbox, clock=lambda: FOUNDED)
    clients = [LightClient(mailbox, client_name(i), tmp_path / str(i), max_bytes=400) for i in range(CLIENTS)]
    downloaded = []
    for entry in plan:
        before = sum(client.participation.downlink.num_bytes for client in clients)
        for index in entry.sampled:
            assert clients[index].step()
        downloaded.append(sum(client.participation.downlink.num_bytes for client in clients) - before)
        downloaded[-1] += files_beside(mailbox, plan, len(downloaded) - 1)
        assert coordinator.close_round() is not None
    assert torch.equal(coordinator.adapter, run.participation.final_adapter())
    assert [row["downlink_bytes"] for row in run.rows[1:]] == downloaded
    run_rounds(coordinator, clients)  # all settle their last message
    for index, client in enumerate(clients):
        simulated = run.participation._open(index)
        assert (simulated.residual is None) == (client.session.residual is None)
        assert simulated.residual is None or torch.equal(simulated.residual, client.session.residual)


def test_uplink_bytes_are_those_of_the_messages(tmp_path):
    run = Run(tmp_path, plan_of(ALL, ALL)).finish()
    total = 0
    for row in run.rows[1:]:
        sizes = [ref.num_bytes for ref in run.participation.mailbox.list_updates(row["round"] - 1)]
        total += sum(sizes)
        assert (row["uplink_bytes"], row["cumulative_uplink_bytes"]) == (sum(sizes), total)
        assert all(size <= 400 for size in sizes)


def test_time_adds_up_and_covers_the_slowest_client(tmp_path):
    run = Run(tmp_path, plan_of(ALL, ALL)).finish()
    times = [row["seconds"]["straggler-tail"] for row in run.rows]
    assert times[0] == 0.0
    for row, earlier, later in zip(run.rows[1:], times[:-1], times[1:], strict=True):
        assert later - earlier >= row["compute_seconds"] - 1e-9
        assert min(row["energy"]["straggler-tail"].values()) > 0


@pytest.mark.parametrize("stop", range(7))
def test_it_goes_on_wherever_it_stopped(tmp_path, stop):
    plan = make_plan(CLIENTS, 2, 3, 0.0, 1)
    straight = Run(tmp_path / "straight", plan).finish()
    stopped = Run(tmp_path / "stopped", plan)
    for _ in range(stop):
        stopped.step()
    stopped.participation.close()
    stopped.restart()
    stopped.finish()
    assert without_clock(stopped.rows) == without_clock(straight.rows)
    assert stopped.trained == straight.trained
    assert torch.equal(stopped.participation.final_adapter(), straight.participation.final_adapter())


def test_a_row_that_was_not_written_is_written_later(tmp_path):
    """Killed after the round was published, before its row was."""
    plan = make_plan(CLIENTS, 2, 3, 0.0, 1)
    straight = Run(tmp_path / "straight", plan).finish()
    stopped = Run(tmp_path / "stopped", plan)
    for _ in range(3):
        stopped.step()
    assert [row["round"] for row in stopped.rows] == [0, 1]
    stopped.rows.pop()
    stopped.participation.close()
    stopped.restart()
    stopped.finish()
    assert without_clock(stopped.rows) == without_clock(straight.rows)
    assert all(row["compute_seconds"] >= 0 for row in stopped.rows[1:])


def test_a_message_that_was_stored_but_not_posted_is_posted(tmp_path, monkeypatch):
    plan = plan_of(ALL, ALL)
    straight = Run(tmp_path / "straight", plan).finish()
    stopped = Run(tmp_path / "stopped", plan)
    with monkeypatch.context() as patch:
        patch.setattr(stopped.participation.mailbox, "post_update", lambda *arguments, **options: 1 / 0)
        stopped.step()
        stopped.step()
        with pytest.raises(ZeroDivisionError):
            stopped.step()
    stopped.participation.close()
    stopped.restart()
    stopped.finish()
    assert without_clock(stopped.rows) == without_clock(straight.rows)
    assert len(stopped.trained) == 4  # no training was repeated


def test_a_round_in_which_everything_is_refused_ends_the_run(tmp_path):
    run = Run(tmp_path, plan_of(ALL), max_message_bytes=10)
    run.step()
    run.step()
    with pytest.raises(FedFSTQError, match=r"round 0 could not be closed: the coordinator refused every update"):
        run.step()


def test_folders_are_released_between_rounds(tmp_path):
    run = Run(tmp_path, plan_of(ALL, ALL))
    for _ in range(3):
        run.step()
    assert len(run.participation._sessions) <= 1
    assert SCHEMA.num_params == len(run.participation.final_adapter())


def test_of_a_lost_message_nothing_stays_in_the_residual(tmp_path):
    """Seed 0 loses client 0's message of the first round, of one packet as the other; both are counted as sent."""
    run = Run(tmp_path, plan_of(((0, 1), (0, 1))), loss=(0.5, 0, 0))
    for _ in range(2):
        run.step()
    pending = {index: run.participation._open(index).pending for index in (0, 1)}
    assert not run.step()
    (row,) = run.rows[1:]
    assert (row["num_updates"], row["num_lost"], row["attempts"]) == (1, 1, 1)
    sizes = [len(held.message) for held in pending.values()]
    assert (row["uplink_bytes"], row["air_bytes"]) == (sum(sizes), sum(sizes))
    residuals = {index: run.participation._open(index).residual for index in (0, 1)}
    assert residuals[0] is None
    assert 0 < residuals[1].norm() < pending[1].corrected.norm()


def test_a_round_that_loses_everything_is_sent_again(tmp_path):
    run = Run(tmp_path, plan_of(((0, 1), (0, 1))), loss=(0.9, 0, 0)).finish()
    (row,) = run.rows[1:]
    assert row["attempts"] > 1
    assert row["num_updates"] >= 1
    assert row["air_bytes"] == row["attempts"] * row["uplink_bytes"]
    assert sum(row["client_air_bytes"]) == row["air_bytes"]
