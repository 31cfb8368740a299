"""What decoders allocate, measured from outside: a bounded multiple of the adapter, whatever a payload says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.attacks.corpus import CODECS

# multiples of the adapter in float32, the decoded update included: 2, and a little that does not grow with the adapter;
# docs/format.md has the measured figures
CEILING = 2.1


@pytest.fixture(scope="module")
def peaks():
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("needs Linux: a process's peak memory is reset through /proc/self/clear_refs")
    root = Path(__file__).parents[2]
    process = subprocess.run(
        [sys.executable, "tests/attacks/measure_memory.py", "16"],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


@pytest.mark.parametrize("name", CODECS)
def test_the_densest_payload(name, peaks):
    assert peaks[name][0] < CEILING


@pytest.mark.parametrize("name", CODECS)
def test_fifty_bytes_of_noise(name, peaks):
    assert peaks[name][1] < CEILING
