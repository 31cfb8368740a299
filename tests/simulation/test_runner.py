"""`fedfstq simulate`: the same federation as of real processes, bit for bit; interrupted and resumed, the same rows."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from launcher import environment
from safetensors.torch import load_file
from tiny_workload import OWNERS, write_client_file

from fedfstq_hf.errors import ConfigError, FedFSTQError
from fedfstq_hf.federation.record import RoundRecord
from fedfstq_hf.recipe import load_recipe
from fedfstq_hf.simulation.runner import Simulation

MEASURED = ("compute_seconds", "client_compute_seconds", "eval_seconds", "seconds", "energy")


def rows(folder):
    """The rows without what a clock measured."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in MEASURED} for line in lines]


def adapters(folder):
    """sha256 of the final adapter of each method and seed."""
    paths = sorted(folder.glob("runs/*/seed-*/mailbox/adapter_model.safetensors"))
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


@pytest.fixture(scope="module")
def finished(tiny_recipe, tmp_path_factory):
    """One uninterrupted run, and its summary."""
    folder = tmp_path_factory.mktemp("simulation") / "out"
    summary = Simulation(load_recipe(tiny_recipe), folder, progress=False).run()
    return folder, summary


def test_what_a_run_leaves(finished):
    folder, summary = finished
    names = {entry.name for entry in folder.iterdir()}
    assert {"metrics.jsonl", "summary.json", "report.md", "adapter", "recipe.json", "runs"} <= names
    assert len([name for name in names if name.endswith(".png")]) >= 3
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert {entry.name for entry in (folder / "adapter").iterdir()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
    }
    adapter = hashlib.sha256((folder / "adapter/adapter_model.safetensors").read_bytes()).hexdigest()
    assert adapter == adapters(folder)["runs/fstq/seed-3/mailbox/adapter_model.safetensors"]


def test_one_row_for_each_method_seed_and_round(finished):
    folder, _ = finished
    found = [(row["method"], row["seed"], row["round"]) for row in rows(folder)]
    assert found == [(method, 3, round) for method in ("fedavg", "fstq") for round in range(4)]


def test_rows_count_the_bytes_that_lie_in_the_mailbox(finished):
    folder, summary = finished
    for method in ("fedavg", "fstq"):
        mailbox = folder / f"runs/{method}/seed-3/mailbox"
        total = 0
        for row in (row for row in rows(folder) if row["method"] == method):
            if row["round"] == 0:
                assert row["uplink_bytes"] == row["downlink_bytes"] == 0
                continue
            updates = list((mailbox / f"updates/{row['round'] - 1:06d}").iterdir())
            assert row["num_updates"] == len(updates) == 3
            assert row["uplink_bytes"] == sum(path.stat().st_size for path in updates)
            total += row["uplink_bytes"]
            assert row["cumulative_uplink_bytes"] == total
        assert summary["methods"][method]["uplink_bytes"] == total
    assert summary["methods"]["fedavg"]["uplink_bytes"] > 5 * summary["methods"]["fstq"]["uplink_bytes"]


def test_the_downlink_is_what_the_federation_was_founded_with_and_then_the_messages(finished):
    """Θ_0 is drawn from the seed; all three clients are asked in every round."""
    folder, _ = finished
    rounds = folder / "runs/fstq/seed-3/mailbox/rounds"

    def size(round, name):
        return (rounds / f"{round:06d}" / name).stat().st_size

    first, *later = [row for row in rows(folder) if row["method"] == "fstq" and row["round"] > 0]
    assert first["downlink_bytes"] == 3 * sum(
        size(0, name) for name in ("spec.json", "adapter_config.json", "round.json")
    )
    for row in later:
        begun = row["round"] - 1
        record = RoundRecord.from_json((rounds / f"{begun:06d}/round.json").read_bytes())
        path = record.path_from(begun - 1)  # three messages may weigh more than so small an adapter
        assert path.num_bytes == size(begun, "frame.safetensors" if path.frames else "adapter_model.safetensors")
        assert row["downlink_bytes"] == 3 * (path.num_bytes + size(begun, "round.json"))


def test_a_second_run_gives_the_same_rows_and_adapters(finished, tiny_recipe, tmp_path):
    folder, _ = finished
    Simulation(load_recipe(tiny_recipe), tmp_path / "again", progress=False).run()
    assert rows(tmp_path / "again") == rows(folder)
    assert adapters(tmp_path / "again") == adapters(folder)


def test_methods_do_not_depend_on_each_other(finished, tiny_recipe, tmp_path):
    folder, _ = finished
    Simulation(load_recipe(tiny_recipe, {"methods": "fstq"}), tmp_path / "alone", progress=False).run()
    assert rows(tmp_path / "alone") == [row for row in rows(folder) if row["method"] == "fstq"]


def test_another_seed_gives_other_rows(finished, tiny_recipe, tmp_path):
    folder, _ = finished
    Simulation(load_recipe(tiny_recipe, {"seeds": "[4]"}), tmp_path / "other", progress=False).run()
    assert {row["seed"] for row in rows(tmp_path / "other")} == {4}
    assert set(adapters(tmp_path / "other").values()).isdisjoint(adapters(folder).values())


def test_clients_that_are_sampled_or_drop_out(tiny_recipe, tmp_path):
    changes = {"clients_per_round": "2", "dropout": "0.5", "rounds": "6", "methods": "fstq", "seeds": "[1]"}
    Simulation(load_recipe(tiny_recipe, changes), tmp_path / "out", progress=False).run()
    trained = [row for row in rows(tmp_path / "out") if row["round"] > 0]
    assert len(trained) == 6
    assert {row["num_updates"] + row["num_dropped"] for row in trained} == {2}
    assert any(row["num_dropped"] for row in trained)


# The same as real processes


def fedfstq(*arguments, **options):
    command = [sys.executable, "-m", "fedfstq_hf.cli", *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def finish(process, seconds=200):
    out, err = process.communicate(timeout=seconds)
    assert process.returncode == 0, err[-3000:]
    return out


def test_three_real_processes_give_the_same_adapter(finished, tiny_recipe, launcher, tmp_path):
    """A coordinator and three clients, each a process of its own, as one types it in four terminals."""
    folder, _ = finished
    box = tmp_path / "box"
    assert "3 updates a round" in launcher.run("init", box, "--recipe", tiny_recipe).stdout
    files = [write_client_file(tiny_recipe.parent, box, owner, tmp_path / "clients") for owner in OWNERS]
    processes = [fedfstq("serve", box, "--poll-seconds", "0.05"), *(fedfstq("train", "--yes", file) for file in files)]
    try:
        served, *_ = [finish(process) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert "Finished. Load it with: PeftModel.from_pretrained(base" in served
    simulated = folder / "runs/fstq/seed-3/mailbox"
    for round in range(4):
        name = f"rounds/{round:06d}/adapter_model.safetensors"
        assert (box / name).read_bytes() == (simulated / name).read_bytes(), round
    for path in simulated.glob("updates/*/*"):
        assert (box / path.relative_to(simulated)).read_bytes() == path.read_bytes()


# Interrupted and resumed


def assert_same(folder, reference):
    assert rows(folder) == rows(reference)
    assert adapters(folder) == adapters(reference)
    names = {entry.name for entry in reference.iterdir()}
    assert {entry.name for entry in folder.iterdir()} == names
    mine, theirs = (json.loads((path / "summary.json").read_text()) for path in (folder, reference))
    for method in theirs["methods"]:
        for key in ("uplink_bytes", "downlink_bytes", "final_metric", "rounds"):
            assert mine["methods"][method][key] == theirs["methods"][method][key]


def test_kills_at_many_points_and_a_resume_after_each(finished, tiny_recipe, launcher, tmp_path):
    """Each life ends a little further on: before, in or after a write of a mailbox, a session or a row."""
    folder, out, lives = finished[0], tmp_path / "out", 0
    for die_at in (1, 7, 20, 33, 47, 60, 75, 90, 106, 123, 140, 170, 200, 240):
        command = launcher.start("simulate", tiny_recipe, "--out", out, "--resume", "--quiet", die_at=die_at)
        if command.wait() == 0:
            break
        assert command.code == -signal.SIGKILL, command.stderr
        lives += 1
    else:
        launcher.run("simulate", tiny_recipe, "--out", out, "--resume", "--quiet")
    assert lives >= 6
    assert_same(out, folder)


@pytest.mark.parametrize("count", [2, 6])
def test_ctrl_c_says_how_to_go_on(finished, tiny_recipe, launcher, tmp_path, count):
    out = tmp_path / "out"
    command = launcher.start("simulate", tiny_recipe, "--out", out, "--rounds", "3")
    deadline = time.monotonic() + 60
    while not (out / "metrics.jsonl").exists() or len((out / "metrics.jsonl").read_text().splitlines()) < count:
        assert command.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    command.kill(signal.SIGINT)
    assert command.wait() == 130
    assert f"Stopped. Go on with: fedfstq simulate {tiny_recipe} --rounds 3 --out {out} --resume" in command.stderr
    assert "Traceback" not in command.stderr
    launcher.run("simulate", tiny_recipe, "--rounds", "3", "--out", out, "--resume")
    assert_same(out, finished[0])


def test_a_torn_last_row_is_written_again(finished, tiny_recipe, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    whole = (out / "metrics.jsonl").read_bytes()
    (out / "metrics.jsonl").write_bytes(whole[:-40])
    Simulation(load_recipe(tiny_recipe), out, resume=True, progress=False).run()
    assert_same(out, finished[0])


def test_resuming_a_finished_run_only_writes_its_report_again(finished, tiny_recipe, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    (out / "summary.json").unlink()
    before = (out / "metrics.jsonl").read_bytes()
    Simulation(load_recipe(tiny_recipe), out, resume=True, progress=False).run()
    assert (out / "metrics.jsonl").read_bytes() == before
    assert_same(out, finished[0])


# Refusals


def test_a_used_folder_is_not_overwritten(finished, tiny_recipe):
    with pytest.raises(ConfigError, match=r"holds a run already\. Go on with it by --resume, or give another --out"):
        Simulation(load_recipe(tiny_recipe), finished[0])


def test_a_run_of_other_settings_is_not_resumed(finished, tiny_recipe):
    with pytest.raises(
        ConfigError, match=r"holds a run of other settings .* Repeat its command, or give another --out"
    ):
        Simulation(load_recipe(tiny_recipe, {"rounds": "4"}), finished[0], resume=True)


def test_a_folder_of_something_else_is_left_alone(tiny_recipe, tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match=r"is not empty and holds no run\. Give a new folder with --out"):
        Simulation(load_recipe(tiny_recipe), tmp_path)
    with pytest.raises(ConfigError, match="is not empty and holds no run"):
        Simulation(load_recipe(tiny_recipe), tmp_path, resume=True)
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_a_start_that_was_killed_in_its_first_write_does_not_block(tiny_recipe, launcher, tmp_path, finished):
    out = tmp_path / "out"
    for point in (3, 4, 5):
        assert launcher.start("simulate", tiny_recipe, "--out", out, "--quiet", die_at=point).wait() == -signal.SIGKILL
        assert not (out / "recipe.json").exists()
    launcher.run("simulate", tiny_recipe, "--out", out, "--quiet")
    assert_same(out, finished[0])


def test_a_damaged_marker_is_named(tiny_recipe, tmp_path):
    (tmp_path / "recipe.json").write_text('{"name": "ti')
    with pytest.raises(ConfigError, match=r"recipe\.json cannot be read"):
        Simulation(load_recipe(tiny_recipe), tmp_path, resume=True)


def test_two_workers_give_the_same_rows_and_adapters(finished, tiny_recipe, tmp_path):
    Simulation(load_recipe(tiny_recipe), tmp_path / "out", progress=False, workers=2).run()
    assert rows(tmp_path / "out") == rows(finished[0])
    assert adapters(tmp_path / "out") == adapters(finished[0])


def test_methods_that_train_a_and_that_do_not_stand_side_by_side(tiny_recipe, tmp_path):
    recipe = load_recipe(tiny_recipe, {"methods.fstq.freeze_a": True, "federation.rounds": 1})
    for workers in (1, 2):
        Simulation(recipe, tmp_path / str(workers), progress=False, workers=workers).run()
    assert rows(tmp_path / "1") == rows(tmp_path / "2")
    assert adapters(tmp_path / "1") == adapters(tmp_path / "2")

    def factor_a(method, round):
        mailbox = tmp_path / f"1/runs/{method}/seed-3/mailbox"
        state = load_file(mailbox / f"rounds/{round:06d}/adapter_model.safetensors")
        return torch.cat([tensor.reshape(-1) for name, tensor in sorted(state.items()) if ".lora_A." in name])

    assert torch.equal(factor_a("fstq", 1), factor_a("fedavg", 0))
    assert not torch.equal(factor_a("fedavg", 1), factor_a("fedavg", 0))


def test_methods_with_adapters_and_learning_rates_of_their_own(finished, tiny_recipe, tmp_path):
    changed = {"methods.fstq.lora.r": 1, "methods.fstq.learning_rate": 1e-4}
    for workers in (1, 2):
        Simulation(load_recipe(tiny_recipe, changed), tmp_path / str(workers), progress=False, workers=workers).run()
    assert rows(tmp_path / "1") == rows(tmp_path / "2")
    assert adapters(tmp_path / "1") == adapters(tmp_path / "2")

    def fedavg(folder):
        return [row for row in rows(folder) if row["method"] == "fedavg"]

    assert fedavg(tmp_path / "1") == fedavg(finished[0])  # the others do not notice
    mailbox = tmp_path / "1/runs/fstq/seed-3/mailbox"
    ranks = {min(tensor.shape) for tensor in load_file(mailbox / "adapter_model.safetensors").values()}
    assert ranks == {1}
    assert json.loads((mailbox / "adapter_config.json").read_text())["r"] == 1
    assert json.loads((mailbox / "rounds/000000/spec.json").read_text())["training"]["learning_rate"] == 1e-4


def test_links_do_not_depend_on_a_methods_own_adapter(tiny_recipe, tmp_path):
    changed = {"links": "[link-10x]", "methods.fedavg.lora.r": 1, "federation.rounds": 1, "methods": "fedavg"}
    whole = {key: value for key, value in changed.items() if "lora" not in key}
    for name, settings in (("small", changed), ("whole", whole)):
        Simulation(load_recipe(tiny_recipe, settings), tmp_path / name, progress=False).run()

    def first_round(name):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return next(row for row in map(json.loads, lines) if row["round"] == 1)

    small, whole = first_round("small"), first_round("whole")
    # one unit of compute, and an upload that is as much shorter as it has fewer bytes
    seconds = [row["seconds"]["link-10x"] - 1.0 for row in (small, whole)]
    sizes = [row["uplink_bytes"] + row["downlink_bytes"] / 5 for row in (small, whole)]
    assert seconds[0] / seconds[1] == pytest.approx(sizes[0] / sizes[1], rel=0.01)


def test_what_fails_in_a_worker_is_said(tiny_recipe, tmp_path):
    # the first server step leaves an adapter in which every gradient of the second round is NaN
    recipe = load_recipe(tiny_recipe, {"methods": "fedavg", "methods.fedavg.server.lr": 1e30})
    with pytest.raises(FedFSTQError, match=r"could not be trained in round \d"):
        Simulation(recipe, tmp_path / "out", progress=False, workers=2).run()


def test_no_workers_are_refused(tiny_recipe, tmp_path):
    with pytest.raises(ConfigError, match="workers must be at least 1"):
        Simulation(load_recipe(tiny_recipe), tmp_path / "out", workers=0)
