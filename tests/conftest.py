"""Shared fixtures: a tiny model, a tiny workload on disk, and processes of the command line."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # models are tiny: a second thread only waits for the first

import pytest
from launcher import Launcher
from peft import PeftModel
from tiny import make_tiny_model


@pytest.fixture
def tiny_model() -> PeftModel:
    return make_tiny_model()


@pytest.fixture(scope="session")
def tiny_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe on a tiny random model and 21 rows of three owners; its folder holds the model and the clients' data."""
    from tiny_workload import make_workload

    return make_workload(tmp_path_factory.mktemp("workload"))


@pytest.fixture(scope="session")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    """Starts `fedfstq` commands as processes, at once."""
    launcher = Launcher(tmp_path_factory.mktemp("commands"))
    yield launcher
    launcher.close()
