"""Runs in one file are the runs of their folders."""

import json

import pytest
from metric_rows import make_rows, write_run
from results import add_to_archive

from fedfstq_hf.cli import main
from fedfstq_hf.errors import ConfigError, DataError
from fedfstq_hf.reporting.comparison.runs import read_runs

LEDGER = {"command": "python recipes/evaluation/run.py fed_med", "commit": "0123abc", "minutes": 1.5}


def finished_run(folder, method, metrics):
    write_run(folder, make_rows(method, metrics))
    (folder / "ledger.json").write_text(json.dumps(LEDGER))
    return folder


@pytest.fixture
def archive(tmp_path):
    runs = {f"{name}/seed-0": finished_run(tmp_path / name, name, values) for name, values in METHODS.items()}
    return add_to_archive(tmp_path / "results" / "fed_med.jsonl.zst", runs)


METHODS = {"fedavg": [4.0, 3.5, 3.2, 3.05, 3.0], "fstq": [4.0, 3.6, 3.3, 3.1, 3.05]}


def test_an_archive_reads_as_its_folders_do(archive, tmp_path):
    folders = read_runs([tmp_path / name for name in METHODS])
    archived = read_runs([archive])
    assert [run.series for run in archived] == [run.series for run in folders]
    assert [run.recipe for run in archived] == [run.recipe for run in folders]
    assert [run.command for run in archived] == [LEDGER["command"]] * 2 == [run.command for run in folders]
    assert [str(run.folder) for run in archived] == [f"{archive}/fedavg/seed-0", f"{archive}/fstq/seed-0"]


def test_the_same_runs_give_the_same_bytes_and_a_run_replaces_its_earlier_self(archive, tmp_path):
    before = archive.read_bytes()
    add_to_archive(archive, {"fstq/seed-0": tmp_path / "fstq"})
    assert archive.read_bytes() == before
    add_to_archive(archive, {"fstq/seed-0": finished_run(tmp_path / "again", "fstq", [4.0, 3.0])})
    assert [len(run.series[run.folder.parent.name][0]) for run in read_runs([archive])] == [5, 2]


def test_methods_are_chosen_by_name(archive, tmp_path):
    assert [list(run.series) for run in read_runs([archive], ["fstq"])] == [["fstq"]]
    with pytest.raises(ConfigError, match=r"'fsqt'. There are runs of fedavg, fstq"):
        read_runs([archive], ["fsqt"])
    page = tmp_path / "page.html"
    with pytest.raises(SystemExit) as ended:
        main(["report", str(archive), "--methods", "fedavg", "--out", str(page)])
    assert ended.value.code == 0
    assert "--methods fedavg" in page.read_text()
    assert "fstq/seed-0" not in page.with_suffix(".md").read_text()


@pytest.mark.parametrize("data", [b"", b"{}\n", b"\x28\xb5\x2f\xfd"])
def test_what_is_no_archive_is_refused(tmp_path, data):
    path = tmp_path / "x.jsonl.zst"
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"cannot be read as an archive"):
        read_runs([path])


def test_an_archive_that_was_cut_short_is_refused(archive):
    archive.write_bytes(archive.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"cannot be read as an archive"):
        read_runs([archive])


def test_an_archive_of_before_the_present_fields_says_which_commit_reads_it(archive, tmp_path):
    folder = finished_run(tmp_path / "old", "fstq", METHODS["fstq"])
    recipe = json.loads((folder / "recipe.json").read_text())
    recipe["methods"]["fstq"]["coverage"] = None
    (folder / "recipe.json").write_text(json.dumps(recipe))
    add_to_archive(archive, {"fstq/seed-0": folder})
    with pytest.raises(ConfigError, match=r"'coverage' in fstq/seed-0/recipe.*git checkout ee91c45 && fedfstq report "):
        read_runs([archive])
