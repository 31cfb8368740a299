"""Kills a client or a coordinator before, in the middle of and after each of its writes, and restarts it. Prints JSON.

The product has no hooks for this: a forked child replaces the functions of `os` and `open` by ones that count, and
kills itself with SIGKILL when the count is reached. Forking from a parent that has imported everything makes a run take
milliseconds, so that every point can be tried. Run by test_crash.py as `crash_driver.py VICTIM FOLDER [EVERY]`.
"""

from __future__ import annotations

import builtins
import dataclasses
import gc
import hashlib
import json
import mmap
import os
import shutil
import signal
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

torch.set_num_threads(1)
_TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(_TESTS / "federation"), str(_TESTS / "helpers"), str(_TESTS.parent)]

import light  # noqa: E402
from light import SCHEMA, LightClient, found  # noqa: E402

from fedfstq_hf.federation.client.session import ClientSession  # noqa: E402
from fedfstq_hf.federation.mailbox.folder import FolderMailbox  # noqa: E402
from fedfstq_hf.federation.record import RoundRecord  # noqa: E402
from fedfstq_hf.federation.server.coordinator import Coordinator  # noqa: E402
from fedfstq_hf.federation.spec import FederationSpec  # noqa: E402

WRITING = ("replace", "rename", "link", "unlink", "remove", "rmdir", "mkdir", "fsync")
BUDGET = 700  # a message of half floats, whose rounding leaves a residual
NEVER = 1 << 60
exact_training = light.fake_training


class Crash:
    """Counts points, tells the parent how many there were, and dies at the chosen one."""

    def __init__(self) -> None:
        self._shared = mmap.mmap(-1, 8)
        self.die_at = NEVER

    @property
    def count(self) -> int:
        return struct.unpack("q", self._shared[:8])[0]

    def reset(self, die_at: int) -> None:
        self.die_at = die_at
        self._shared[:8] = struct.pack("q", 0)

    def point(self) -> None:
        reached = self.count + 1
        self._shared[:8] = struct.pack("q", reached)
        if reached == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
            signal.pause()

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.point()
            result = function(*args, **kwargs)
            self.point()
            return result

        return counted

    def install(self) -> None:
        for name in WRITING:
            setattr(os, name, self.around(getattr(os, name)))
        plain_open = builtins.open

        def counted_open(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if not set(mode) & set("wax+"):
                return plain_open(file, mode, *args, **kwargs)
            self.point()
            opened = plain_open(file, mode, *args, **kwargs)
            self.point()
            return _HalfWritten(opened, self) if "b" in mode else opened

        builtins.open = counted_open


class _HalfWritten:
    """A file whose writes can be cut in the middle."""

    def __init__(self, file: Any, crash: Crash) -> None:
        self._file, self._crash = file, crash

    def write(self, data: bytes) -> None:
        self._file.write(data[: len(data) // 2])
        self._file.flush()
        self._crash.point()
        self._file.write(data[len(data) // 2 :])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _HalfWritten:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


# What the victims do


def run_client(folder: Path) -> None:
    client = LightClient(FolderMailbox(folder), "a", folder / "clients" / "a", max_bytes=BUDGET)
    while not client.done:
        if not client.step():
            time.sleep(0.001)


def run_noisy_client(folder: Path) -> None:
    """As on a GPU whose sums come out differently each time: what was trained twice must not be sent twice."""
    light.fake_training = noisy_training
    run_client(folder)


def noisy_training(*arguments: Any) -> Any:
    result = exact_training(*arguments)
    noise = torch.from_numpy(np.frombuffer(os.urandom(len(result.adapter)), dtype=np.uint8).astype(np.float32))
    return dataclasses.replace(result, adapter=result.adapter + noise / 1000)


def run_coordinator(folder: Path) -> None:
    Coordinator(FolderMailbox(folder)).serve(poll_seconds=0.001)


def run_trainer(folder: Path) -> None:
    from tiny import make_arguments, make_tiny_data, make_tiny_model

    from fedfstq_hf import FedFSTQConfig, FedFSTQTrainer

    config = FedFSTQConfig(mailbox=str(folder), client_id="a", uplink_budget=1500, poll_seconds=0.002)
    trainer = FedFSTQTrainer(
        model=make_tiny_model(),
        args=make_arguments(folder / "clients" / "a-trainer"),
        train_dataset=make_tiny_data(5),
        federation=config,
    )
    trainer.train()


# What stays alive beside a victim, in the parent; each call says whether anything happened


class Beside:
    def __init__(self, folder: Path, names: str, coordinate: bool) -> None:
        self.mailbox = FolderMailbox(folder, durable=False)
        self.clients = [LightClient(self.mailbox, name, folder / "clients" / name, max_bytes=BUDGET) for name in names]
        self.coordinator = Coordinator(self.mailbox) if coordinate else None

    def turn(self) -> bool:
        coordinator, happened = self.coordinator, False
        # Beside a client the others come second, so that it meets the same points in each run.
        if coordinator is None or coordinator.finished or self.mailbox.list_updates(coordinator.record.round):
            happened = sum(client.step() for client in self.clients) > 0
        if coordinator is not None and not coordinator.finished and coordinator.ready():
            happened = coordinator.close_round() is not None or happened
        return happened

    def close(self) -> None:
        for client in self.clients:
            client.session.close()


VICTIMS: dict[str, tuple[Callable[[Path], None], str, bool]] = {
    "client": (run_client, "b", True),
    "noisy client": (run_noisy_client, "b", True),
    "coordinator": (run_coordinator, "ab", False),
    "trainer": (run_trainer, "", True),
}


def spawn(work: Callable[[Path], None], folder: Path, crash: Crash, die_at: int) -> int:
    crash.reset(die_at)
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    try:
        os.dup2(2, 1)  # stdout is for the result
        crash.install()
        if work is run_trainer:
            torch.Tensor.backward = crash.around(torch.Tensor.backward)
        work(folder)
        os._exit(0)
    finally:
        os._exit(1)


def federation(victim: str, folder: Path, crash: Crash, deaths: list[int]) -> dict[str, Any]:
    """One federation in which the victim dies at the given points, one per life, and then lives."""
    shutil.rmtree(folder, ignore_errors=True)
    work, names, coordinate = VICTIMS[victim]
    if victim == "trainer":
        found_for_trainer(folder)
    else:
        found(folder, codec="fp16", server={"optimizer": "SGD", "lr": 0.9, "momentum": 0.5})
    beside = Beside(folder, names, coordinate)
    left, killed = list(deaths), 0
    pid = spawn(work, folder, crash, left.pop(0) if left else NEVER)
    deadline = time.monotonic() + 60
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done and os.WIFSIGNALED(status):
            killed += 1
            pid = spawn(work, folder, crash, left.pop(0) if left else NEVER)
        elif done:
            if status:
                raise SystemExit(f"the victim failed with status {status} after {killed} kills at {deaths}")
            break
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            raise SystemExit(f"the federation does not end after {killed} kills at {deaths}")
        if not beside.turn():
            time.sleep(0.0003)
    while beside.turn():
        pass
    beside.close()
    return {"deaths": deaths, "killed": killed, "points": crash.count, **outcome(folder)}


def found_for_trainer(folder: Path) -> None:
    from tiny import make_tiny_model

    from fedfstq_hf.adapter import AdapterView, base_fingerprint, config_json
    from fedfstq_hf.federation import adapter_file
    from fedfstq_hf.federation.founding import found_federation

    model = make_tiny_model()
    view = AdapterView(model)
    spec = FederationSpec(
        name="crash",
        model="tiny",
        base_fingerprint=base_fingerprint(model),
        schema=view.schema.fingerprint,
        rounds=2,
        local_steps=2,
        max_message_bytes=100_000,
    )
    mailbox = FolderMailbox(folder, durable=False)
    found_federation(mailbox, spec, adapter_file.dump(view.state()), config_json(model, view.name))


def outcome(folder: Path) -> dict[str, Any]:
    """All that must not depend on crashes: adapters, the updates they were made from, and residuals."""
    mailbox = FolderMailbox(folder)
    head = mailbox.head()
    assert head is not None
    records = [RoundRecord.from_json(mailbox.read(number, "round.json")) for number in range(head + 1)]
    residuals = {}
    for path in sorted((folder / "clients").glob("?")):
        spec = FederationSpec.from_json(mailbox.read(0, "spec.json"))
        session = ClientSession(path.name, spec, SCHEMA, folder=path)
        kept = b"" if session.residual is None else session.residual.numpy().tobytes()
        residuals[path.name] = [hashlib.sha256(kept).hexdigest(), session.last_round, session.pending is None]
        session.close()
    leftovers = [
        str(path.relative_to(folder))
        for path in folder.rglob(".tmp-*")
        if "updates" not in path.relative_to(folder).parts
    ]
    return {
        "root": hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest(),
        "rounds": [
            [
                record.adapter_sha256,
                [(update.client_id, update.sha256) for update in record.accepted],
                len(record.refused),
            ]
            for record in records
        ],
        "residuals": residuals,
        "leftovers": leftovers,
    }


def main(victim: str, folder: Path, every: int) -> None:
    if victim == "trainer":
        import tiny  # noqa: F401 - imports transformers and peft once, for all children

        import fedfstq_hf.trainer.trainer  # noqa: F401
    gc.freeze()  # the children share these pages
    crash = Crash()
    reference = federation(victim, folder, crash, [])
    runs = []
    for number, point in enumerate(range(1, reference["points"] + 1, every)):
        # A second death comes early in the second life, where it repairs what the first one left.
        runs.append(federation(victim, folder, crash, [point] if number % 4 else [point, 1 + point // 3]))
    print(json.dumps({"reference": reference, "runs": runs}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 1)
