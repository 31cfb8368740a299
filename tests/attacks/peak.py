"""Resident memory that a call adds at its peak, measured by the kernel in this process. Linux only."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import pytest


def peak_bytes(call: Callable[[], object]) -> int:
    """Bytes at the peak above those before; skips the test where the kernel does not say."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux: a process's peak memory is reset through /proc/self/clear_refs")
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key + ":"))
