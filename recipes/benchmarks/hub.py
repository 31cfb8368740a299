"""Many client processes against a busy, faulty loopback Hub: does every update land, and count exactly once?

Run it from a checkout: `python recipes/benchmarks/hub.py --clients 20 --rounds 10 --layout all`, and with
`--kills 100` to SIGKILL the coordinator and the clients that many times each. Clients are real sessions with the real
Hub client; only their training is a pure function. The Hub is `tests/loopback_hub`, in its own process.
Each layout's final adapter is compared with that of the same federation in a folder.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).parents[2]
sys.path[:0] = [str(CHECKOUT), str(CHECKOUT / "tests" / "helpers"), str(CHECKOUT / "tests" / "federation")]

LAYOUTS = ("own", "shared", "pull-request")
ADDRESS = "hf://lab/run"
LIMIT_SECONDS = 1500.0


def main() -> None:
    """Read the options, run each layout, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--layout", default="all", choices=(*LAYOUTS, "all"))
    parser.add_argument("--commit-seconds", type=float, default=0.3, help="a commit takes that long; others get 409")
    parser.add_argument("--faults", type=float, default=0.05, help="share of requests hit by a random fault")
    parser.add_argument("--kills", type=int, default=0, help="SIGKILLs of the coordinator, and as many of clients")
    parser.add_argument("--timeout", type=float, default=2.0, help="seconds to wait for an answer")
    parser.add_argument("--poll", type=float, default=1.0, help="seconds between two looks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--crew", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.crew:
        Crew(json.loads(options.crew)).run()
        return
    layouts = LAYOUTS if options.layout == "all" else (options.layout,)
    results = [run_layout(layout, options) for layout in layouts]
    for result in results:
        print(json.dumps(result))
    if options.out:
        options.out.write_text(json.dumps({"command": " ".join(sys.argv), "results": results}, indent=1) + "\n")
    if not all(result["identical"] and result["counted_once"] and not result["kills"]["crashes"] for result in results):
        sys.exit(1)


def run_layout(layout: str, options: argparse.Namespace) -> dict[str, Any]:
    """One federation on a Hub of its own; returns its figures."""
    from tests.federation.light import make_spec
    from tests.loopback_hub.loopback import RemoteHub

    names = [f"c{index:02d}" for index in range(options.clients)]
    spec = make_spec(
        salt="benchmark", codec="fstq", rounds=options.rounds, min_clients=options.clients, uplink_budget=600
    )
    with tempfile.TemporaryDirectory(prefix="fedfstq-hub-") as folder:
        hub = RemoteHub.start(Path(folder) / "homes")
        try:
            hub.org("lab")
            token, member = {
                "own": ("contributor", None),
                "shared": ("write", None),
                "pull-request": ("write", "read"),
            }[layout]
            tokens = {name: hub.user(name, token, org="lab", member=member) for name in names}
            owner = hub.user("owner", "write", org="lab")
            environment = hub.env(FEDFSTQ_HUB_TIMEOUT=str(options.timeout), OMP_NUM_THREADS="1")
            work = {
                "layout": layout,
                "owner": owner,
                "tokens": tokens,
                "spec": spec.to_json().decode(),
                "folder": folder,
                "kills": options.kills,
                "seed": options.seed,
                "poll": options.poll,
            }
            crew = [sys.executable, __file__, "--crew"]
            subprocess.run([*crew, json.dumps(work | {"task": "found"})], env=environment, check=True)
            hub.log.clear()
            hub.faults.configure(
                commit_seconds=options.commit_seconds,
                rate=options.faults,
                hang_seconds=1.5 * options.timeout,
                retry_after=1,
                seed=options.seed,
            )
            started = time.perf_counter()
            done = subprocess.run(
                [*crew, json.dumps(work | {"task": "work"})],
                env=environment,
                check=True,
                stdout=subprocess.PIPE,
                text=True,
            )
            seconds = time.perf_counter() - started
            counts = hub.log.per_user()
            adapter = hub.read("lab/run", "adapter_model.safetensors")
            records = [
                json.loads(hub.read("lab/run", f"fedfstq/rounds/{r:06d}/round.json")) for r in range(1, spec.rounds + 1)
            ]
        finally:
            hub.close()
        expected = folder_adapter(spec, names, Path(folder) / "mailbox")
    per_client = [counts[name] / options.rounds for name in names]
    accepted = [[update["client_id"] for update in record.get("accepted", ())] for record in records]
    return {
        "layout": layout,
        "clients": options.clients,
        "rounds": options.rounds,
        "kills": json.loads(done.stdout),
        "seconds": round(seconds, 1),
        "counted_once": all(sorted(clients) == names for clients in accepted),
        "refused_or_late": sum(len(record.get("refused", ())) + len(record.get("late", ())) for record in records),
        "identical": hashlib.sha256(adapter).digest() == hashlib.sha256(expected).digest(),
        "requests_per_client_and_round": round(sum(per_client) / len(per_client), 1),
        "coordinator_requests_per_round": round(counts["owner"] / options.rounds, 1),
    }


def folder_adapter(spec: Any, names: list[str], folder: Path) -> bytes:
    """The final adapter of the same federation in a folder mailbox."""
    from fedfstq_hf.federation import adapter_file
    from fedfstq_hf.federation.founding import found_federation
    from fedfstq_hf.federation.mailbox.folder import FolderMailbox
    from fedfstq_hf.federation.server.coordinator import Coordinator
    from tests.federation.light import LightClient, initial_state, run_rounds

    mailbox = FolderMailbox(folder, durable=False)
    found_federation(mailbox, spec, adapter_file.dump(initial_state()), b"{}\n")
    clients = [LightClient(mailbox, name, None, max_bytes=spec.method.uplink_budget) for name in names]
    run_rounds(Coordinator(mailbox), clients)
    return mailbox.read_root("adapter_model.safetensors") or b""


class Crew:
    """The processes of one federation, forked from one that has imported everything."""

    def __init__(self, work: dict[str, Any]) -> None:
        from fedfstq_hf.federation.spec import FederationSpec

        self.work = work
        self.spec = FederationSpec.from_json(work["spec"].encode())
        self.random = random.Random(work["seed"])
        self.fork = multiprocessing.get_context("fork")

    def run(self) -> None:
        """Found the federation, or let it work until it ends and print how many were killed."""
        if self.work["task"] == "found":
            from fedfstq_hf.federation import adapter_file
            from fedfstq_hf.federation.control import Control, Enrolment
            from fedfstq_hf.federation.founding import found_federation
            from tests.federation.light import initial_state

            accounts = {name: Enrolment(account=name) for name in self.work["tokens"]}
            mailbox = self.mailbox(self.work["owner"], create=True, layout=self.work["layout"])
            found_federation(
                mailbox, self.spec, adapter_file.dump(initial_state()), b"{}\n", control=Control(clients=accounts)
            )
            return
        print(json.dumps(self.supervise()))

    def mailbox(self, token: str, **options: Any) -> Any:
        """The federation's mailbox, seen with a token."""
        from fedfstq_hf.federation.mailbox.hub.mailbox import HubMailbox

        return HubMailbox(ADDRESS, token=token, **options)

    def supervise(self) -> dict[str, int]:
        """Keep every process alive until all have ended by themselves, killing some on the way."""
        parts: dict[str, Any] = {"coordinator": self.coordinate}
        for name in self.work["tokens"]:
            parts[name] = lambda name=name: self.take_part(name)
        running = {name: self.start(part) for name, part in parts.items()}
        left = {"coordinator": self.work["kills"], "clients": self.work["kills"]}
        kills = {**dict.fromkeys(left, 0), "crashes": 0}
        started = time.monotonic()
        while running:
            time.sleep(self.random.uniform(0.02, 0.2) if any(left.values()) else 0.2)
            if time.monotonic() - started > LIMIT_SECONDS:
                raise SystemExit(f"not finished after {LIMIT_SECONDS:.0f} s: {sorted(running)} still run")
            for name, process in list(running.items()):
                if not process.is_alive():
                    if process.exitcode == 0:
                        del running[name]
                    else:  # a process must end by itself or by our hand, never by an error
                        kills["crashes"] += process.exitcode != -signal.SIGKILL
                        running[name] = self.start(parts[name])
            self.kill_one(running, left, kills)
        return kills

    def kill_one(self, running: dict[str, Any], left: dict[str, int], kills: dict[str, int]) -> None:
        """SIGKILL one process, of either kind in turn, if kills are left."""
        kind = max(left, key=lambda kind: left[kind])
        names = [name for name in running if (name == "coordinator") == (kind == "coordinator")]
        if not left[kind] or not names:
            return
        victim = running[self.random.choice(names)]
        if victim.pid is not None and victim.is_alive():
            os.kill(victim.pid, signal.SIGKILL)
            victim.join()
            left[kind] -= 1
            kills[kind] += 1

    def start(self, part: Any) -> Any:
        """Fork a process."""
        process = self.fork.Process(target=part, daemon=True)
        process.start()
        return process

    def coordinate(self) -> None:
        """The coordinator's process."""
        from fedfstq_hf.federation.server.coordinator import Coordinator

        Coordinator(self.mailbox(self.work["owner"])).serve(poll_seconds=self.work["poll"])

    def take_part(self, name: str) -> None:
        """A client's process."""
        from fedfstq_hf.codec.budget import MessageBudget
        from fedfstq_hf.federation.client.participation import MailboxParticipation
        from fedfstq_hf.federation.client.session import ClientSession
        from tests.federation.light import SCHEMA, fake_training

        session = ClientSession(name, self.spec, SCHEMA, folder=Path(self.work["folder"]) / name)
        participation = MailboxParticipation(
            self.mailbox(self.work["tokens"][name]),
            session,
            budget=MessageBudget(fixed=int(self.spec.method.uplink_budget or 0)),
            poll_seconds=self.work["poll"],
        )
        while (assignment := participation.next()) is not None:
            result = fake_training(assignment.adapter, assignment.seed, session.carried)
            participation.complete(assignment, result)


if __name__ == "__main__":
    main()
