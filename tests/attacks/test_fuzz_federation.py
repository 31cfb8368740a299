"""The two fuzzers of a federation, a few cases each: `recipes/benchmarks/fuzz_mailbox.py` and `fuzz_serve.py`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "recipes" / "benchmarks"


@pytest.mark.skipif(sys.platform != "linux", reason="the fuzzers look at processes through Linux's own means")
@pytest.mark.parametrize(
    ("script", "ends"),
    [
        ("fuzz_mailbox.py", ("message sent", "refused: MailboxError")),
        ("fuzz_serve.py", ("closed with its update", "closed, its update refused", "closed without it")),
    ],
)
def test_no_case_is_a_problem(script, ends):
    command = [sys.executable, str(BENCHMARKS / script), "--cases", "80", "--workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "80 cases in" in done.stdout
    assert "0 problems" in done.stdout
    for end in ends:
        assert f"  {end}\n" in done.stdout
