"""SIGKILL before, in the middle of and after every write, then a restart: the outcome is the same, bit for bit."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

DRIVER = Path(__file__).with_name("crash_driver.py")


def drive(victim, every):
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        driver = subprocess.run(
            [sys.executable, str(DRIVER), victim, f"{folder}/federation", str(every)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=250,
        )
    assert driver.returncode == 0, driver.stderr[-3000:]
    result = json.loads(driver.stdout)
    assert len(result["runs"]) == -(-result["reference"]["points"] // every)
    assert all(run["killed"] >= 1 for run in result["runs"])
    return result["reference"], result["runs"]


@pytest.mark.parametrize(
    ("victim", "every", "least_points"),
    [
        ("client", 1, 60),  # real session, codec and mailbox; the training is a pure function
        ("coordinator", 1, 60),
        ("trainer", 13, 60),  # a real FedFSTQTrainer, at some of its points; backward passes are points too
    ],
)
def test_a_kill_at_any_point_changes_nothing(victim, every, least_points):
    reference, runs = drive(victim, every)
    assert reference["points"] >= least_points
    assert len(reference["rounds"]) == 3
    assert reference["root"] == reference["rounds"][-1][0]
    assert reference["leftovers"] == []
    for run in runs:
        for what in ("root", "rounds", "residuals", "leftovers"):
            assert run[what] == reference[what], (what, run["deaths"])


def test_nothing_is_sent_twice_where_training_again_gives_other_numbers():
    """A message that was ever posted is the one that is stored: other bytes would be a conflict, and end the client."""
    _, runs = drive("noisy client", 4)
    for run in runs:
        assert [len(accepted) for _, accepted, _ in run["rounds"]] == [0, 2, 2]
        assert run["residuals"]["a"][1:] == [1, True]
