"""The disk is full at every single write in turn: one clear error, nothing half there, and then it goes on."""

import builtins
import errno
import os
import tempfile
from pathlib import Path

import pytest
from light import LightClient, found

from fedfstq_hf.errors import MailboxError
from fedfstq_hf.federation.mailbox.folder import FolderMailbox
from fedfstq_hf.federation.record import RoundRecord
from fedfstq_hf.federation.server.coordinator import Coordinator

NEEDS_SPACE = ("mkdir", "link", "rename", "replace", "fsync")


class FullDisk:
    """Counts the calls that need space, and fails the chosen one."""

    def __init__(self, monkeypatch, fails_at):
        self.calls, self.fails_at = 0, fails_at
        for name in NEEDS_SPACE:
            monkeypatch.setattr(os, name, self.around(getattr(os, name)))
        plain = builtins.open

        def counted_open(file, mode="r", *args, **kwargs):
            if set(mode) & set("wax+"):
                self.call()
                opened = plain(file, mode, *args, **kwargs)
                return _Filling(opened, self) if mode == "wb" else opened
            return plain(file, mode, *args, **kwargs)

        monkeypatch.setattr(builtins, "open", counted_open)

    def call(self):
        self.calls += 1
        if self.calls == self.fails_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def around(self, function):
        def counted(*args, **kwargs):
            self.call()
            return function(*args, **kwargs)

        return counted


class _Filling:
    """A file that may take only half of what is written."""

    def __init__(self, file, disk):
        self._file, self._disk = file, disk

    def write(self, data):
        self._file.write(data[: len(data) // 2])
        self._disk.call()
        self._file.write(data[len(data) // 2 :])

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()


def federation(path):
    """A whole federation in this process, its parts built anew after each error; returns outcome and errors."""
    errors, parts = [], {}

    def part(name):
        if name not in parts:
            mailbox = FolderMailbox(path)
            build = LightClient if name != "coordinator" else None
            parts[name] = build(mailbox, name, path / name) if build else Coordinator(mailbox)
        return parts[name]

    def attempt(name, action):
        try:
            return action(part(name))
        except MailboxError as error:
            errors.append(str(error))
            broken = parts.pop(name, None)
            if isinstance(broken, LightClient):
                broken.session.close()
            return None

    for _ in range(30):
        for name in "ab":
            attempt(name, LightClient.step)
        attempt("coordinator", lambda coordinator: coordinator.serve(once=True))
        if all(isinstance(parts.get(name), LightClient) and parts[name].done for name in "ab"):
            break
    else:
        pytest.fail(f"the federation does not end: {errors}")
    attempt("coordinator", lambda coordinator: coordinator.mailbox.refresh_root())
    mailbox = FolderMailbox(path)
    records = [RoundRecord.from_json(mailbox.read(number, "round.json")) for number in range(3)]
    residuals = {name: parts[name].session.residual for name in "ab"}
    for name in "ab":
        parts[name].session.close()
    outcome = [(record.adapter_sha256, record.accepted, record.refused) for record in records]
    outcome.append({name: None if value is None else value.tolist() for name, value in residuals.items()})
    outcome.append((path / "adapter_model.safetensors").read_bytes())
    return outcome, errors


@pytest.fixture
def memory(tmp_path):
    """A folder in memory where there is one: syncing hundreds of files to a disk takes its time."""
    if not os.path.isdir("/dev/shm"):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


def test_wherever_the_disk_is_full(memory):
    def run(number, fails_at):
        path = memory / str(number)
        found(path, codec="fp16", server={"optimizer": "SGD", "lr": 0.9, "momentum": 0.5})
        with pytest.MonkeyPatch.context() as patch:
            disk = FullDisk(patch, fails_at)
            outcome, errors = federation(path)
        leftovers = list(path.rglob(".tmp-*"))
        return outcome, errors, disk.calls, leftovers

    expected, errors, calls, _ = run(0, None)
    assert errors == []
    assert calls > 100
    assert all(any(residual) for residual in expected[-2].values())
    for fails_at in range(1, calls + 1):
        outcome, errors, _, leftovers = run(fails_at, fails_at)
        assert outcome == expected, fails_at
        assert len(errors) == 1, (fails_at, errors)
        assert "No space left on device" in errors[0]
        assert "Free some space and start again" in errors[0]
        assert leftovers == [], fails_at
