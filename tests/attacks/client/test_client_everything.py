"""A folder with every kind of planted object at once: `fedfstq serve` closes the honest clients' rounds to the end."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from light import LightClient, found
from light_updates import make_message, ones
from planting import FILES, KINDS, odd_names

from fedfstq_hf.federation.mailbox.protocol import SALIENCY_FILE
from fedfstq_hf.federation.record import RoundRecord
from fedfstq_hf.federation.server.coordinator import Coordinator
from fedfstq_hf.reporting.card.federation_card import card_maker

ALL = {**KINDS, **FILES}
ROUNDS = 3
BAD_METRICS = (
    b'{"eval_loss": 1e308}',
    b'{"eval_loss": NaN}',
    b'{"eval_loss": ' + b"9" * 400 + b"}",
    b"[" * 10_000,
    b"\xff\xfe",
    json.dumps({f"m{number}": 1.0 for number in range(2000)}).encode(),
    json.dumps({r"$\frac{": 1.0, "\x1b[31m": 1.0, "<!-- fedfstq:end -->": 1.0, "x: [": 1.0}).encode(),
)


def names():
    return {f"x{number:02}": kind for number, kind in enumerate(ALL.values())}


def plant(box: Path, round: int) -> None:
    """All that one client, who may write in the folder, can leave for a round."""
    for place in ("updates", "refinements"):
        folder = box / place / f"{round:06d}"
        folder.mkdir(parents=True, exist_ok=True)
        for client, kind in names().items():
            put(kind, folder / f"{client}.safetensors")
        odd_names(folder)
        put(KINDS["folder"], folder / ".tmp-half")
    metrics = box / "metrics" / f"{round:06d}"
    metrics.mkdir(parents=True, exist_ok=True)
    for client, kind in names().items():
        put(kind, metrics / f"{client}.json")
    for number, data in enumerate(BAD_METRICS):
        (metrics / f"y{number}.json").write_bytes(data)
    for client, kind in names().items():
        folder = box / "attachments" / client
        folder.mkdir(parents=True, exist_ok=True)
        put(kind, folder / SALIENCY_FILE)
    for number, kind in enumerate(KINDS.values()):
        for place in ("updates", "metrics", "rounds", "refinements"):
            put(kind, box / place / f"{900_000 + number}")
        put(kind, box / "attachments" / f"z{number}")
    for name in ("README.md", "history.jsonl", "quality_vs_uplink.png"):
        (box / name).unlink(missing_ok=True)
        (KINDS["pipe"] if name == "README.md" else KINDS["link to a device"])(box / name)


def put(kind, path):
    if not os.path.lexists(path):
        kind(path)


def records(mailbox):
    return [RoundRecord.from_json(mailbox.read(round, "round.json")) for round in range(1, mailbox.head() + 1)]


@pytest.mark.timeout(200)
def test_serve_closes_the_round_of_the_honest_ones(tmp_path):
    """The command itself, in a process of its own: nothing hangs, nothing ends it, nothing reaches the terminal."""
    box = tmp_path / "box"
    mailbox = found(box, rounds=1, share_saliency=True)
    plant(box, 0)
    clients = [LightClient(mailbox, name, tmp_path / name) for name in "ab"]
    for client in clients:
        client.step()
    served = subprocess.run(
        [sys.executable, "-m", "fedfstq_hf.cli", "serve", str(box)], capture_output=True, text=True, timeout=190
    )
    assert served.returncode == 0, served.stderr[-2000:]
    assert "\x1b" not in served.stdout + served.stderr
    assert [[entry.client_id for entry in record.accepted] for record in records(mailbox)] == [["a", "b"]]
    assert "Finished." in served.stdout
    assert (box / "README.md").read_text(encoding="utf-8").startswith("---\n")
    for client in clients:
        client.step()
        assert client.done


@pytest.mark.timeout(30)
def test_what_is_refused_is_named_in_the_record_and_the_rest_in_the_log(tmp_path, caplog):
    box = tmp_path / "box"
    mailbox = found(box, rounds=2)
    for name in "ab":
        mailbox.post_update(0, name, make_message(mailbox, name, ones(1)))
    plant(box, 0)
    coordinator = Coordinator(mailbox, card=card_maker("box"))
    coordinator.serve(once=True)
    (record,) = records(mailbox)
    assert [entry.client_id for entry in record.accepted] == ["a", "b"]
    files = {client for client, kind in names().items() if kind in FILES.values()}
    assert {entry.client_id for entry in record.refused} == files
    for client in set(names()) - files:
        assert f"updates/000000/{client}.safetensors" in caplog.text


@pytest.mark.timeout(60)
@pytest.mark.parametrize("seed", range(8))
def test_one_client_s_random_doings_close_every_round(tmp_path, seed):
    """Before and after each call of the coordinator, and between the readings, one thing is put or taken away."""
    rng = random.Random(seed)
    box = tmp_path / "box"
    mailbox = found(box, rounds=ROUNDS, share_saliency=True)
    coordinator = Coordinator(mailbox, card=lambda facts: {"README.md": b"card"}, saliency=lambda files: {})
    original = mailbox.read_update

    def do_something():
        place = rng.choice(
            [
                f"updates/{coordinator.record.round:06d}/x.safetensors",
                f"metrics/{coordinator.record.round:06d}/x.json",
                f"attachments/x/{SALIENCY_FILE}",
                f"rounds/{coordinator.record.round + 1:06d}",
                "README.md",
            ]
        )
        path = box / place
        path.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(path):
            path.rename(path.with_name(f".gone-{rng.random()}"))
        if rng.random() < 0.2 and place.startswith("updates"):
            path.write_bytes(make_message(mailbox, "x", ones(rng.choice([1, 1e30])), round=coordinator.record.round))
        elif rng.random() < 0.9:
            rng.choice(list(ALL.values()))(path)

    def read(ref, *, max_bytes):
        if ref.client_id == "x" or rng.random() < 0.3:
            do_something()
        return original(ref, max_bytes=max_bytes)

    mailbox.read_update = read
    for round in range(ROUNDS):
        for name in "ab":
            mailbox.post_update(round, name, make_message(mailbox, name, ones(1), round=round))
        for _ in range(10):
            do_something()
            if coordinator.record.round > round:
                break
            coordinator.serve(once=True)
        assert coordinator.record.round == round + 1
    for record in records(mailbox):
        assert {"a", "b"} <= {entry.client_id for entry in record.accepted}
