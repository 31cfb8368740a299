"""SIGKILL at random moments: clients and coordinator of a real federation are killed and restarted until it ends.

Needs nothing but the installed package; about 5 minutes on 2 CPU cores. Run:

    python recipes/benchmarks/crash.py
    python recipes/benchmarks/crash.py --kills 1000 --seed 1 --clients 5      # override any setting

Each process is a `fedfstq serve` or `fedfstq train` on the embedded model and data, forked from this one so that it
starts at once. A killed process is started again by the same command. Federations follow each other until there were
enough kills; each must publish the same adapters, from the same messages, as one that nobody disturbed. Exits with 1
where one does not. tests/federation/test_crash.py kills at every single write instead of at random moments.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

import fedfstq_hf.running.train  # noqa: F401 - imported once here, for all processes that are forked
from fedfstq_hf.cli import main as fedfstq
from fedfstq_hf.demo import make_examples  # noqa: F401
from fedfstq_hf.federation.mailbox.folder import FolderMailbox
from fedfstq_hf.federation.mailbox.protocol import RECORD_FILE
from fedfstq_hf.federation.record import RoundRecord

COORDINATOR = "coordinator"
GIVE_UP = 600.0  # seconds for one federation


def start(arguments: list[str], log: Path) -> int:
    """Fork a process that runs `fedfstq ARGUMENTS`; returns its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(output, 1)
        os.dup2(output, 2)
        fedfstq(arguments)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    finally:
        sys.stdout.flush()
        os._exit(code)


def commands(folder: Path, settings: argparse.Namespace) -> dict[str, list[str]]:
    """The command of each process. Every client has data of its own: another number of the demo's notes."""
    box = str(folder / "box")
    result = {COORDINATOR: ["serve", box, "--poll-seconds", "0.05"]}
    for number in range(settings.clients):
        name = f"client-{number}"
        file = folder / f"{name}.yaml"
        file.write_text(
            f"mailbox: {box}\nclient_id: {name}\noutput_dir: {folder / name}\npoll_seconds: 0.05\n"
            f"data: {{path: demo, train_limit: {8 + 4 * number}}}\ntraining: {{disable_tqdm: true}}\n"
        )
        result[name] = ["train", "--yes", str(file)]
    return result


def federation(
    folder: Path, settings: argparse.Namespace, draw: random.Random | None, kills: Counter[str]
) -> list[str]:
    """Run one federation to its end, killing as long as there is somebody who draws; returns what it published."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    overrides = ["--training.local_steps", "2", "--training.per_device_train_batch_size", "2", "--seeds", "[0]"]
    init = ["init", str(folder / "box"), "--recipe", "quickstart", "--min-clients", str(settings.clients)]
    pid = start([*init, "--rounds", str(settings.rounds), *overrides], folder / "init.log")
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
        raise SystemExit((folder / "init.log").read_text())
    todo = commands(folder, settings)
    alive = {name: start(arguments, folder / f"{name}.log") for name, arguments in todo.items()}
    begun = time.monotonic()
    next_kill = begun + draw.expovariate(1 / settings.gap) if draw else float("inf")
    while alive:
        if time.monotonic() >= next_kill and draw is not None:
            victim = draw.choice(sorted(alive))
            os.kill(alive[victim], signal.SIGKILL)
            next_kill = time.monotonic() + draw.expovariate(1 / settings.gap)
        for name, pid in list(alive.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            if not done:
                continue
            del alive[name]
            code = os.waitstatus_to_exitcode(status)
            if code == -signal.SIGKILL:
                kills[name] += 1
                alive[name] = start(todo[name], folder / f"{name}.log")
            elif code:
                log = (folder / f"{name}.log").read_text()[-3000:]
                raise SystemExit(f"{name} failed with exit code {code}:\n{log}")
        if time.monotonic() - begun > GIVE_UP:
            raise SystemExit(f"the federation in {folder} does not end; its logs are there")
        time.sleep(0.002)
    return published(FolderMailbox(folder / "box"))


def published(mailbox: FolderMailbox) -> list[str]:
    """Each round's adapter and the messages that it was made from, and the adapter at the root, as sha256."""
    head = mailbox.head() or 0
    records = [RoundRecord.from_json(mailbox.read(round, RECORD_FILE)) for round in range(head + 1)]
    found = [[record.adapter_sha256, *(update.sha256 for update in record.updates)] for record in records]
    root = hashlib.sha256((mailbox.path / "adapter_model.safetensors").read_bytes()).hexdigest()
    return [*itertools.chain(*found), root]


def main() -> None:
    """Run federations until there were enough kills, and say whether any came out different."""
    torch.set_num_threads(1)  # before anything is computed: threads do not survive a fork
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="in total, over as many federations as it takes")
    parser.add_argument("--clients", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--gap", type=float, default=0.6, help="mean seconds between two kills")
    parser.add_argument("--seed", type=int, default=0)
    settings = parser.parse_args()
    draw, kills, different, federations = random.Random(settings.seed), Counter[str](), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        begun = time.monotonic()
        expected = federation(Path(folder) / "undisturbed", settings, None, Counter())
        print(f"undisturbed: {settings.rounds} rounds, {settings.clients} clients, {time.monotonic() - begun:.1f} s")
        begun = time.monotonic()
        while kills.total() < settings.kills:
            before, federations = kills.total(), federations + 1
            same = federation(Path(folder) / "disturbed", settings, draw, kills) == expected
            different += not same
            answer = "identical" if same else "DIFFERENT"
            print(f"federation {federations}: {kills.total() - before} kills, {answer}", flush=True)
        spent = time.monotonic() - begun
    victims = ", ".join(f"{name} {count}" for name, count in sorted(kills.items()))
    print(f"{kills.total()} kills ({victims}) in {federations} federations, {spent:.0f} s")
    print(f"final adapter {expected[-1][:16]}: bit-identical in {federations - different} of {federations} federations")
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    main()
