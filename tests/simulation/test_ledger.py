"""The ledger: every method and seed a run of its own, what is missing is run, what is done stays done."""

import json

import pytest
from ledger import entries, run_missing
from results import add_to_archive, write_result

from fedfstq_hf.errors import ConfigError
from fedfstq_hf.recipe import Recipe, load_recipe
from fedfstq_hf.recipe.library import sweep_points, without_swept
from fedfstq_hf.reporting.comparison.runs import read_archive


def names(listed):
    return [str(entry) for entry in listed]


def states(listed):
    return [entry.state() for entry in listed]


def run(listed, root):
    return [outcome for _, outcome in run_missing(listed, root, command="typed", workers=1, progress=False)]


def test_the_first_seed_of_everything_comes_first(tiny_recipe, tmp_path):
    recipe = load_recipe(tiny_recipe, {"seeds": "2"})
    assert names(entries({"a": recipe, "b": recipe}, tmp_path)) == [
        "a fedavg seed 0",
        "a fstq seed 0",
        "b fedavg seed 0",
        "b fstq seed 0",
        "a fedavg seed 1",
        "a fstq seed 1",
        "b fedavg seed 1",
        "b fstq seed 1",
    ]


def test_a_sweep_has_a_run_for_each_value(tiny_recipe, tmp_path):
    recipe = load_recipe(tiny_recipe, {"sweep": {"federation.dropout": [0.0, 0.5]}, "methods": "fstq"})
    listed = entries({"d": recipe}, tmp_path)
    assert [entry.recipe.federation.dropout for entry in listed] == [0.0, 0.5]
    assert [str(entry.folder.relative_to(tmp_path)) for entry in listed] == [
        "d/dropout=0.0/fstq/seed-3",
        "d/dropout=0.5/fstq/seed-3",
    ]
    assert [label for label, _ in sweep_points(without_swept(recipe, {"dropout": "0.1"}))] == [""]


def test_a_sweep_of_what_no_recipe_has_is_refused(tiny_recipe):
    recipe = load_recipe(tiny_recipe, {"sweep": {"federation.dropuot": [0.0]}})
    with pytest.raises(ConfigError, match=r"recipe tiny, dropuot=0\.0.*dropout"):
        sweep_points(recipe)


@pytest.fixture(scope="module")
def finished(tiny_recipe, tmp_path_factory):
    root = tmp_path_factory.mktemp("ledger")
    listed = entries({"tiny": load_recipe(tiny_recipe)}, root)
    assert states(listed) == ["missing", "missing"]
    assert run(listed, root) == ["done", "done"]
    return root


def test_what_is_done_is_not_run_again(finished, tiny_recipe):
    listed = entries({"tiny": load_recipe(tiny_recipe)}, finished)
    assert states(listed) == ["done", "done"]
    assert run(listed, finished) == []
    facts = json.loads((listed[0].folder / "ledger.json").read_text())
    assert (facts["command"], facts["resumed"], facts["workers"]) == ("typed", False, 1)
    assert not (listed[0].folder / "runs/fedavg/seed-3/clients").exists()


def test_methods_seeds_words_and_targets_leave_finished_runs_alone(finished, tiny_recipe):
    mapping = load_recipe(tiny_recipe).to_dict()
    mapping |= {"description": "other words", "seeds": [3, 4], "target": {"fraction": 0.5}}
    mapping["methods"]["more"] = {"codec": "fp16"}
    listed = entries({"tiny": Recipe.from_dict(mapping)}, finished)
    assert states(listed) == ["done", "done", "missing", "missing", "missing", "missing"]


def test_other_settings_are_seen_and_not_overwritten(finished, tiny_recipe):
    listed = entries({"tiny": load_recipe(tiny_recipe, {"methods.fstq.uplink_budget": "321"})}, finished)
    assert states(listed) == ["done", "other settings"]
    (outcome,) = run(listed, finished)
    assert outcome == f"holds a run of other settings; to run it again: rm -r {listed[1].folder}"


def test_a_run_of_before_a_setting_existed_counts_with_its_default(finished, tiny_recipe):
    (entry, _) = entries({"tiny": load_recipe(tiny_recipe)}, finished)
    marker = entry.folder / "recipe.json"
    mapping = json.loads(marker.read_text())
    del mapping["federation"]["packet_loss"]
    marker.write_text(json.dumps(mapping))
    assert entry.state() == "done"


def test_a_run_that_was_cut_off_goes_on(tiny_recipe, tmp_path):
    listed = entries({"tiny": load_recipe(tiny_recipe, {"methods": "fstq"})}, tmp_path)
    assert run(listed, tmp_path) == ["done"]
    (listed[0].folder / "ledger.json").unlink()
    assert states(listed) == ["begun"]
    assert run(listed, tmp_path) == ["done"]
    assert json.loads((listed[0].folder / "ledger.json").read_text())["resumed"] is True


def test_two_ledgers_do_not_run_at_once(finished, tiny_recipe):
    listed = entries({"tiny": load_recipe(tiny_recipe, {"seeds": "[9]"})}, finished)
    first = run_missing(listed, finished, command="typed", workers=1, progress=False)
    next(first)
    with pytest.raises(ConfigError, match="Another process runs the ledger"):
        next(run_missing(listed, finished, command="typed"))
    first.close()


def test_a_result_holds_the_figures_and_how_to_rerun_them(finished, tiny_recipe, tmp_path):
    listed = entries({"tiny": load_recipe(tiny_recipe)}, finished)
    archive = tmp_path / "r" / "tiny.jsonl.zst"
    add_to_archive(archive, {entry.folder.relative_to(finished).as_posix(): entry.folder for entry in listed[:1]})
    add_to_archive(archive, {entry.folder.relative_to(finished).as_posix(): entry.folder for entry in listed})
    assert [run["run"] for run in read_archive(archive)] == ["tiny/fedavg/seed-3", "tiny/fstq/seed-3"]
    tree = json.loads(write_result(archive, tmp_path / "r" / "tiny.json").read_text())
    assert tree["commands"] == ["typed"]
    (workload,) = tree["workloads"]
    assert list(workload["methods"]) == ["fedavg", "fstq"]
    row = json.loads((listed[1].folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert workload["methods"]["fstq"]["uplink_bytes"] == [row["cumulative_uplink_bytes"], None]
    assert workload["methods"]["fstq"]["seeds"] == [3]
