"""Methods that are more than a codec: alike in a simulation, in its workers, and as real processes on a folder."""

import json
from pathlib import Path

import pytest
import yaml
from test_runner import adapters, rows
from tiny_workload import OWNERS, write_client_file

from fedfstq_hf.errors import ConfigError
from fedfstq_hf.recipe import load_recipe
from fedfstq_hf.running.foundation import found, make_spec
from fedfstq_hf.simulation.runner import Simulation

METHODS = {
    "fedavg": {"codec": "fp32"},
    "scaffold": {"codec": "fp32", "scaffold": True},
    "fedbat": {"codec": "fedbat", "learned_binarisation": True},
    "fed-tome": {"codec": "fp16", "token_merge_ratio": 0.5, "token_merge_layer": 0},
    "by-examples": {"codec": "fstq", "uplink_budget": 900, "budget_by_examples": True},
    "capped": {
        "codec": "topk",
        "uplink_budget": 900,
        "uplink_cap": "0.00025s@straggler-tail",
    },
    "shared": {"codec": "topk", "uplink_budget": "round:2700B"},
    "fedadam": {"codec": "fp32", "server": {"optimizer": "FedAdam", "lr": 0.01}},
}


@pytest.fixture(scope="module")
def recipe(tiny_recipe, tmp_path_factory):
    """The tiny recipe with these methods, two rounds, all three clients in each."""
    path = tmp_path_factory.mktemp("methods") / "methods.yaml"
    settings = yaml.safe_load(Path(tiny_recipe).read_text()) | {"methods": METHODS}
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="module")
def simulated(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("simulated") / "out"
    Simulation(load_recipe(recipe), folder, progress=False).run()
    return folder


def test_each_does_something_of_its_own(simulated):
    finals = adapters(simulated)
    assert len(finals) == len(set(finals.values())) == len(METHODS)


def test_scaffold_pays_twice_in_both_directions(simulated):
    by_method = {
        name: [row for row in rows(simulated) if row["method"] == name and row["round"] > 0] for name in METHODS
    }
    for plain, scaffold in zip(by_method["fedavg"], by_method["scaffold"], strict=True):
        assert 1.8 * plain["uplink_bytes"] < scaffold["uplink_bytes"] < 2.1 * plain["uplink_bytes"]
    # the first round starts from zeros, which nobody needs to download
    first, *later = zip(by_method["fedavg"], by_method["scaffold"], strict=True)
    assert abs(first[0]["downlink_bytes"] - first[1]["downlink_bytes"]) < 10  # "true" and "false" in their specs
    for plain, scaffold in later:
        box = simulated / "runs/scaffold/seed-3/mailbox/rounds"
        variate = (box / f"{plain['round'] - 1:06d}/control_variate.safetensors").stat().st_size
        assert scaffold["downlink_bytes"] > 3 * variate


def test_two_workers_give_the_same(recipe, simulated, tmp_path):
    Simulation(load_recipe(recipe), tmp_path / "out", progress=False, workers=2).run()
    assert rows(tmp_path / "out") == rows(simulated)
    assert adapters(tmp_path / "out") == adapters(simulated)


def test_a_mean_number_of_examples_stands_in_the_spec_or_is_asked_for(recipe, simulated):
    spec = json.loads((simulated / "runs/by-examples/seed-3/mailbox/rounds/000000/spec.json").read_text())
    assert spec["mean_examples"] == 7
    loaded = load_recipe(recipe)
    with pytest.raises(ConfigError, match="--mean-examples 200"):
        make_spec(loaded, "by-examples", found(loaded, 3), seed=3, min_clients=1)


@pytest.mark.parametrize("method", ["scaffold", "fedbat", "by-examples", "shared"])
def test_real_processes_give_the_same(method, recipe, simulated, tiny_recipe, launcher, tmp_path):
    box = tmp_path / "box"
    launcher.run("init", box, "--recipe", recipe, "--method", method, "--mean-examples", "7")
    files = [write_client_file(tiny_recipe.parent, box, owner, tmp_path / "clients") for owner in OWNERS]
    commands = [
        launcher.start("serve", box, "--poll-seconds", "0.05"),
        *(launcher.start("train", "--yes", file) for file in files),
    ]
    for command in commands:
        assert command.wait() == 0, command.stderr[-3000:]
    expected = simulated / f"runs/{method}/seed-3/mailbox/rounds"
    names = ["adapter_model.safetensors", *(["control_variate.safetensors"] if method == "scaffold" else [])]
    for name in names:
        assert (box / "rounds/000003" / name).read_bytes() == (expected / "000003" / name).read_bytes()
    spec = json.loads((box / "rounds/000000/spec.json").read_text())
    assert (spec["method"]["scaffold"], spec["num_clients"]) == (method == "scaffold", 3)
