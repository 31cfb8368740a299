"""Runs the real command line in processes that start at once: a warm parent forks one per command.

Importing torch and transformers takes seconds, and a test that kills and restarts a command does it many times. This
file is both sides: `Launcher` in the test process, and, run as a script, the parent that imports everything and forks.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]


def environment() -> dict[str, str]:
    """For processes of the command line: one thread, no network, this checkout."""
    settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY), "COLUMNS": "200"}
    return os.environ | settings


@dataclass
class Command:
    """A running `fedfstq` command. Its output lies in files."""

    pid: int
    out: Path
    launcher: Launcher
    code: int | None = None

    def poll(self) -> int | None:
        """Exit code, negative for a signal; None while it runs."""
        if self.code is None:
            self.code = self.launcher._ask({"poll": self.pid})["code"]
        return self.code

    def wait(self, seconds: float = 120) -> int:
        deadline = time.monotonic() + seconds
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"still running after {seconds} s: {self.stderr[-2000:]}")
            time.sleep(0.005)
        return code

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    @property
    def stdout(self) -> str:
        return self.out.with_suffix(".out").read_text()

    @property
    def stderr(self) -> str:
        return self.out.with_suffix(".err").read_text()


class Launcher:
    """Starts commands; close it when done."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0
        self._parent = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
        )

    def start(self, *arguments: object, die_at: int | None = None, cwd: Path | None = None) -> Command:
        """Run `fedfstq ARGUMENTS`; with `die_at`, until it kills itself at that point (see crash_driver.py)."""
        self._count += 1
        out = self._folder / f"command-{self._count}"
        for suffix in (".out", ".err"):
            out.with_suffix(suffix).touch()
        argv = [str(argument) for argument in arguments]
        request = {"argv": argv, "out": str(out), "die_at": die_at, "cwd": str(cwd or self._folder)}
        return Command(self._ask(request)["pid"], out, self)

    def run(self, *arguments: object, cwd: Path | None = None) -> Command:
        """Run a command to its end, which must be a good one."""
        command = self.start(*arguments, cwd=cwd)
        code = command.wait()
        assert code == 0, f"exit code {code}: {command.stderr[-3000:]}"
        return command

    def close(self) -> None:
        assert self._parent.stdin is not None
        self._parent.stdin.close()
        self._parent.wait(10)

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self._parent.stdin is not None
        assert self._parent.stdout is not None
        self._parent.stdin.write(json.dumps(request) + "\n")
        self._parent.stdin.flush()
        return json.loads(self._parent.stdout.readline())


def fails(launcher: Launcher, *arguments: object, code: int = 2, cwd: Path | None = None) -> str:
    """The command ends with this code and one message, without a traceback; returns the message on one line."""
    command = launcher.start(*arguments, cwd=cwd)
    assert command.wait() == code, command.stderr[-2000:]
    assert "Traceback" not in command.stderr
    return " ".join(command.stderr.split())


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    """Until it holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _child(request: dict[str, Any]) -> None:
    for stream, name in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(request["out"] + name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), stream)
    os.close(0)
    os.chdir(request["cwd"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if request["die_at"] is not None:
        from crash_driver import Crash

        crash = Crash()
        crash.reset(request["die_at"])
        crash.install()
    from fedfstq_hf.cli import main

    code = 1
    try:
        main(request["argv"])
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # what Python itself would print
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _serve() -> None:
    sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests" / "federation")]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    import gc

    import torch

    torch.set_num_threads(1)
    import fedfstq_hf.running.train
    import fedfstq_hf.simulation.runner  # noqa: F401

    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer: dict[str, Any] = {"code": os.waitstatus_to_exitcode(status) if pid else None}
        else:
            pid = os.fork()
            if pid == 0:
                _child(request)
            answer = {"pid": pid}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve()
