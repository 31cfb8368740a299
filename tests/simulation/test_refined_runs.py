"""Simulated federations with refinements: bytes and time of both messages, kills, workers, losses and caps."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from test_participation import ALL, CLIENTS, Run, plan_of, without_clock
from test_runner import adapters, rows

from fedfstq_hf.codec import message
from fedfstq_hf.federation.client.session import Caps
from fedfstq_hf.federation.mailbox.protocol import RECORD_FILE
from fedfstq_hf.federation.record import RoundRecord
from fedfstq_hf.recipe import load_recipe
from fedfstq_hf.recipe.network import LinkProfile, LinkRates, deliver, draw_rates
from fedfstq_hf.simulation.population import make_plan
from fedfstq_hf.simulation.runner import Simulation

REFINED = {
    "codec": "topk",
    "uplink_budget": 400,
    "refinement_budget": 480,
    "preview_step": 0.5,
    "error_feedback": 0.0,
}
THREE = (ALL, ALL, ALL)


def refined(folder, plan, loss=(0.0, 0, 0), **changes):
    return Run(folder, plan, loss, **(REFINED | changes))


def record(run, round):
    return RoundRecord.from_json(run.participation.mailbox.read(round, RECORD_FILE))


def sizes(run, round, refinements=False):
    """client id -> bytes of its message of a round."""
    refs = run.participation.mailbox.list_updates(round, refinements=refinements)
    return {ref.client_id: ref.num_bytes for ref in refs}


def used(run, round):
    """The clients whose refinements the record of a round names."""
    return [entry.client_id for entry in record(run, round).refinements]


# Rows


def test_uplink_bytes_count_both_messages_of_the_round_s_clients(tmp_path):
    run = refined(tmp_path, plan_of(*THREE)).finish()
    total = 0
    for row in run.rows[1:]:
        first, second = sizes(run, row["round"] - 1), sizes(run, row["round"] - 1, True)
        assert len(second) == (0 if row["round"] == 3 else 2)
        assert all(size <= 400 for size in first.values()) or row["round"] == 3
        assert all(400 < size <= 480 for size in second.values())
        total += sum(first.values()) + sum(second.values())
        assert row["cumulative_uplink_bytes"] == total
        assert row["uplink_bytes"] == row["air_bytes"] == sum(first.values()) + sum(second.values())
        assert row["client_air_bytes"] == list(first.values())
        assert row.get("client_refinement_bytes", []) == list(second.values())
        assert (row["num_updates"], row["num_lost"]) == (2, 0)
    assert total == sum(record(run, round).uplink_bytes for round in (1, 2, 3))  # counted once, whoever counts
    assert [used(run, round) for round in (1, 2, 3)] == [[], *[["client-0000", "client-0001"]] * 2]


def test_rounds_after_those_with_previews_have_one_message_of_each_client_as_long_as_a_refinement(tmp_path):
    run = refined(tmp_path, plan_of(*THREE), preview_rounds=1).finish()
    assert [len(sizes(run, round, True)) for round in range(3)] == [2, 0, 0]
    assert all(size <= 400 for size in sizes(run, 0).values())
    assert all(400 < size <= 480 for round in (1, 2) for size in sizes(run, round).values())
    assert [used(run, round) for round in (1, 2, 3)] == [[], ["client-0000", "client-0001"], []]
    assert ["client_refinement_bytes" in row for row in run.rows] == [False, True, False, False]


def test_the_backlog_of_a_round_is_part_of_the_next_one(tmp_path):
    """A byte takes client 0 a second and client 1 no time to speak of; nothing else takes any."""
    run = refined(tmp_path, plan_of(((0,), (0,)), ((1,), (1,)), ((0,), (0,))))
    rates = LinkRates(uplink=np.array([8.0, 8e9, 1.0, 1.0]), downlink=np.full(4, np.inf))
    run.participation._links = [(LinkProfile("hand", compute_seconds=0.0), rates)]
    run.finish()
    seconds = [row["seconds"]["hand"] for row in run.rows]
    first, second, last = run.rows[1:]
    assert seconds[1] == first["client_air_bytes"][0]  # the preview
    assert first["backlog"] == {"hand": {"0": first["client_refinement_bytes"][0]}}
    assert seconds[2] - seconds[1] == first["client_refinement_bytes"][0]  # longer than the whole second round
    assert second["backlog"] == {"hand": {}}
    assert seconds[3] - seconds[2] == last["client_air_bytes"][0]
    assert {"backlog", "client_refinement_bytes"}.isdisjoint(last)  # the last round has no refinements


def test_rows_of_a_federation_without_refinements_are_as_before(tmp_path):
    run = Run(tmp_path, plan_of(ALL, ALL)).finish()
    assert all({"backlog", "client_refinement_bytes"}.isdisjoint(row) for row in run.rows)


def test_a_lost_refinement_leaves_its_preview_in_its_place(tmp_path):
    loss = (0.5, 0, 1)
    run = refined(tmp_path, plan_of(*THREE), loss=loss).finish()
    lost = []
    for round in (0, 1):
        sent = {0: 480, 1: 480}  # of one packet, however long it is
        arrived = [
            f"client-000{index}"
            for index in deliver(
                sent, loss=loss[0], retransmissions=loss[1], seed=loss[2], round=round, refinements=True
            ).arrived
        ]
        assert list(sizes(run, round, True)) == used(run, round + 2) == arrived
        row = run.rows[round + 1]
        assert all(size > 400 for size in row["client_refinement_bytes"])  # it was on the air all the same
        assert (
            row["uplink_bytes"] == sum(row["client_refinement_bytes"]) + sum(row["client_air_bytes"]) // row["attempts"]
        )
        lost.append(2 - len(arrived))
    assert 0 < sum(lost) < 4, "the seed should lose some refinements and not all"


# Interruptions


@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5])
def test_it_goes_on_wherever_it_stopped(tmp_path, stop):
    plan = make_plan(CLIENTS, 2, 3, 0.0, 1)
    straight = refined(tmp_path / "straight", plan).finish()
    stopped = refined(tmp_path / "stopped", plan)
    for _ in range(stop):
        stopped.step()
    stopped.participation.close()
    stopped.restart()
    stopped.finish()
    assert comparable(stopped.rows) == comparable(straight.rows)
    assert torch.equal(stopped.participation.final_adapter(), straight.participation.final_adapter())


def comparable(rows):
    """Without what a clock measured: the backlog is what is left when the measured round is over."""
    return [{key: value for key, value in row.items() if key != "backlog"} for row in without_clock(rows)]


@pytest.mark.parametrize("posts", range(4))
def test_killed_between_two_messages_of_a_round_it_sends_the_rest(tmp_path, monkeypatch, posts):
    plan = plan_of(*THREE)
    straight = refined(tmp_path / "straight", plan).finish()
    stopped = refined(tmp_path / "stopped", plan)
    mailbox, done = stopped.participation.mailbox, []

    def killed(*arguments, **options):
        if len(done) == posts:
            raise ZeroDivisionError
        done.append(type(mailbox).post_update(mailbox, *arguments, **options))

    with monkeypatch.context() as patch:
        patch.setattr(mailbox, "post_update", killed)
        with pytest.raises(ZeroDivisionError):
            stopped.finish()
    assert len(sizes(stopped, 0)) + len(sizes(stopped, 0, True)) == posts
    stopped.participation.close()
    stopped.restart()
    stopped.finish()
    assert comparable(stopped.rows) == comparable(straight.rows)
    assert torch.equal(stopped.participation.final_adapter(), straight.participation.final_adapter())
    assert len(stopped.trained) == 6  # no training was repeated


def test_a_run_without_refinements_is_gone_on_with_and_has_no_files_about_them(tmp_path):
    plan = plan_of(ALL, ALL)
    straight = Run(tmp_path / "straight", plan).finish()
    begun = Run(tmp_path / "begun", plan)
    begun.step()
    begun.participation._emit = lambda row: 1 / 0
    with pytest.raises(ZeroDivisionError):  # killed before it wrote the row of round 1
        begun.finish()
    begun.participation.close()
    assert [path.name for path in (tmp_path / "begun/sent").iterdir()] == ["000000.json"]
    begun.restart()
    begun.finish()
    assert without_clock(begun.rows) == without_clock(straight.rows)


# Caps


def test_a_client_whose_cap_holds_no_header_sends_its_refinement_alone(tmp_path):
    run = refined(tmp_path, plan_of(*THREE))
    run.participation._caps = [Caps(1), *[Caps()] * (CLIENTS - 1)]
    run.finish()
    for row in run.rows[1:3]:
        assert list(sizes(run, row["round"] - 1)) == ["client-0001"]
        assert list(sizes(run, row["round"] - 1, True)) == ["client-0000", "client-0001"]
        assert (row["num_updates"], row["num_lost"], row["client_air_bytes"][0]) == (1, 0, 0)
        assert all(size > 400 for size in row["client_refinement_bytes"])
    assert [used(run, round) for round in (2, 3)] == [["client-0000", "client-0001"]] * 2
    assert run.rows[3]["num_updates"] == 2  # the last round has one message of everyone


def test_where_no_preview_says_anything_none_is_sent_and_the_round_waits_for_refinements(tmp_path):
    run = refined(tmp_path, plan_of(*THREE))
    run.participation._caps = [Caps(1)] * CLIENTS
    before = run.participation.coordinator.adapter.clone()
    run.finish()
    assert [row["num_updates"] for row in run.rows] == [0, 0, 0, 2]
    assert torch.equal(run.evaluated[1], before)  # what was sent counts a round later
    assert not torch.equal(run.evaluated[2], before)
    assert used(run, 2) == ["client-0000", "client-0001"]
    for row in run.rows[1:3]:
        sent = list(sizes(run, row["round"] - 1, True).values())
        assert sizes(run, row["round"] - 1) == {}
        assert (row["client_air_bytes"], row["client_refinement_bytes"]) == (sent, [0, 0])
        assert (row["uplink_bytes"], row["num_lost"]) == (sum(sent), 0)
        assert row["seconds"]["straggler-tail"] > run.rows[row["round"] - 1]["seconds"]["straggler-tail"]


def test_where_no_preview_says_anything_and_all_is_lost_it_is_sent_again(tmp_path):
    run = refined(tmp_path, plan_of(*THREE), loss=(0.8, 0, 3))
    run.participation._caps = [Caps(1)] * CLIENTS
    run.finish()
    attempts = [row["attempts"] for row in run.rows[1:3]]
    assert max(attempts) > 1
    for row in run.rows[1:3]:
        assert row["air_bytes"] == row["attempts"] * row["uplink_bytes"]
        assert sizes(run, row["round"] - 1, True)


# Recipes

LINK = {"name": "uneven", "uplink_mbps": 8.0, "spread": 0.5, "tail_fraction": 0.3, "tail_mbps": [2.85, 3.05]}
SECONDS = 0.0008
METHOD = {
    "codec": "topk",
    "uplink_budget": 325,
    "uplink_cap": "1e-9s@uneven",
    "refinement_budget": 480,
    "refinement_cap": f"{SECONDS}s@uneven",
    "preview_step": 0.5,
    "error_feedback": 0.0,
    "weights": "precision",
}


@pytest.fixture(scope="module")
def recipe(tiny_recipe, tmp_path_factory):
    settings = yaml.safe_load(Path(tiny_recipe).read_text())
    path = tmp_path_factory.mktemp("recipe") / "refined.yaml"
    path.write_text(yaml.safe_dump(settings | {"methods": {"refined": METHOD}, "links": [LINK]}))
    return load_recipe(path)


@pytest.fixture(scope="module")
def finished(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("refined") / "out"
    Simulation(recipe, folder, progress=False).run()
    return folder


def plain(folder):
    return [{key: value for key, value in row.items() if key != "backlog"} for row in rows(folder)]


def test_no_refinement_takes_longer_than_it_may(recipe, finished):
    mailbox = finished / "runs/refined/seed-3/mailbox"
    rates = draw_rates(recipe.links[0], recipe.federation.clients, 3).uplink
    carried = [int(SECONDS * rate / 8) for rate in rates]
    assert min(carried) < 480
    for row in plain(finished)[1:3]:
        assert row["client_refinement_bytes"] == [0, 0, 0]  # no preview says anything: they are waited for
        for client, size in zip(row["clients"], row["client_air_bytes"], strict=True):
            assert min(480, carried[client]) - 12 < size <= min(480, carried[client])
    last = sorted((mailbox / "updates/000002").iterdir())
    for client, path in enumerate(last):  # as long as refinements, and none follows
        assert message.unpack(path.read_bytes())[0].params == {}
        assert path.stat().st_size <= min(480, carried[client])
    assert not (mailbox / "refinements/000002").exists()


def test_two_workers_give_the_same_rows_and_adapters(recipe, finished, tmp_path):
    Simulation(recipe, tmp_path / "out", progress=False, workers=2).run()
    assert plain(tmp_path / "out") == plain(finished)
    assert adapters(tmp_path / "out") == adapters(finished)
    assert [len(row.get("client_refinement_bytes", ())) for row in plain(finished)] == [0, 3, 3, 0]


def test_a_resumed_run_gives_the_same_rows(recipe, finished, tmp_path):
    class Killed(BaseException):
        pass

    out = tmp_path / "out"
    first = Simulation(recipe, out, progress=False)
    emit_to = first._emit_to

    def dying(*arguments):
        emit = emit_to(*arguments)

        def emit_or_die(row):
            if row["round"] == 2:  # published, and its row not written
                raise Killed
            emit(row)

        return emit_or_die

    first._emit_to = dying
    with pytest.raises(Killed):
        first.run()
    Simulation(recipe, out, progress=False, resume=True).run()
    assert plain(out) == plain(finished)
    assert adapters(out) == adapters(finished)
