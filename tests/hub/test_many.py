"""A small slice of recipes/benchmarks/hub.py: real processes on a busy, faulty Hub, some of them killed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "recipes" / "benchmarks" / "hub.py"


@pytest.mark.parametrize(
    ("layout", "kills"),
    [("own", 6), ("shared", 0), ("pull-request", 0)],
)
def test_every_update_counts_once_and_the_adapter_is_that_of_a_folder(layout: str, kills: int, tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    options = ["--layout", layout, "--clients", "3", "--rounds", "2", "--kills", str(kills), "--out", str(out)]
    options += ["--commit-seconds", "0.1", "--timeout", "1", "--poll", "0.2"]
    command = [sys.executable, str(BENCHMARK), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    figures = json.loads(out.read_text())["results"][0]
    assert figures["identical"]
    assert figures["counted_once"]
    assert figures["kills"] == {"coordinator": kills, "clients": kills, "crashes": 0}
