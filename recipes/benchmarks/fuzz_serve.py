"""One hostile client against a coordinator: the others' round closes each time, and nothing else happens.

Every case is a federation of three clients in a folder. Two send good messages. The third puts whatever it likes where
it may write: messages (mutated, resealed with a valid digest, replaced by folders, links, FIFOs, devices), refinements,
attachments and metrics. `fedfstq serve` then starts, closes the round and renews the card. A case is a problem when it
raises, runs longer than 60 s, takes more than 1 GB, leaves one of the two good messages out, publishes a number that
is not finite or a step longer than clipping allows, writes outside the mailbox, reads a private file, opens a
connection, starts a process or unpickles. Linux only. Run:

    python recipes/benchmarks/fuzz_serve.py                                  # 100,000 cases on two cores
    python recipes/benchmarks/fuzz_serve.py --cases 500 --workers 1 --first 7000
"""

from __future__ import annotations

import logging
import os
import random
import re
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import hostile
import hostile_run

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the package is imported by the worker processes, after this
os.environ["HF_HUB_OFFLINE"] = "1"

GOOD, BAD = ("good-a", "good-b"), "bad"
MAX_GROWTH = 10**9  # bytes that one case may map
CARD_SHARE = 0.01  # of the cases renew the card with its plot, which takes most of their time
SHAPES = {"layer.lora_A.weight": (4, 24), "layer.lora_B.weight": (24, 4)}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"codec": "fp32", "share_saliency": True},
    "fstq": {"codec": "fstq", "enrolled": True, "round_seconds": 60.0},
    "late": {"codec": "fstq", "max_staleness": 2},
    "refined": {"codec": "fstq", "refinement_budget": 4000, "preview_step": 0.5},
    "scaffold": {"codec": "fp32", "scaffold": True},
    "precision": {"codec": "topk", "weights": "precision", "enrolled": True},
}


@dataclass(frozen=True)
class Template:
    """An honest federation in which the good clients have sent the messages of round `round`."""

    folder: Path
    round: int
    message: bytes
    longest: float


@dataclass(frozen=True)
class Stage:
    """What a worker process keeps between cases."""

    root: Path
    templates: tuple[Template, ...]
    watch: hostile.Watch


def make_stage(root: Path) -> Stage:
    """Found the honest federations; one round of each is over in half of the templates."""
    import torch

    root.mkdir(parents=True, exist_ok=True)
    secret = root / hostile.SECRET
    secret.write_text('{"prompt": "private", "answer": "private"}\n')
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    templates = [_template(root, name, state, rounds) for name in SETTINGS for rounds in (0, 1)]
    return Stage(root, tuple(templates), hostile.Watch(secret))


def _template(root: Path, name: str, state: dict[str, Any], rounds: int) -> Template:
    import torch

    from fedfstq_hf.codec import Schema
    from fedfstq_hf.codec.budget import MessageBudget
    from fedfstq_hf.federation import adapter_file
    from fedfstq_hf.federation.client.participation import LocalResult, MailboxParticipation
    from fedfstq_hf.federation.client.session import ClientSession
    from fedfstq_hf.federation.control import Control, Enrolment
    from fedfstq_hf.federation.founding import found_federation
    from fedfstq_hf.federation.mailbox.folder import FolderMailbox
    from fedfstq_hf.federation.server.coordinator import Coordinator
    from fedfstq_hf.federation.spec import FederationSpec
    from fedfstq_hf.methods import MethodSettings

    schema = Schema.from_state_dict(state)
    settings = dict(SETTINGS[name])
    enrolled = settings.pop("enrolled", False)
    own = {name: settings.pop(name) for name in ("share_saliency", "round_seconds") if name in settings}
    spec = FederationSpec(
        name=f"fuzzed {name}",
        model="demo",
        base_fingerprint={},
        schema=schema.fingerprint,
        rounds=4,
        local_steps=1,
        max_message_bytes=8192,
        min_clients=2,
        num_clients=3,
        method=MethodSettings(**settings),
        **own,
    )
    folder = root / f"template-{name}-{rounds}"
    mailbox = FolderMailbox(folder, durable=False)
    control = Control(clients={client: Enrolment() for client in (*GOOD, BAD)}) if enrolled else None
    config = b'{"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["layer"]}\n'
    found_federation(mailbox, spec, adapter_file.dump(state), config, control=control, now=0.0)
    generator = torch.Generator().manual_seed(1)
    parts = {}
    for client in (*GOOD, BAD):
        session = ClientSession(client, spec, schema, folder=None)
        budget = MessageBudget(fixed=1500 if spec.method.refinement_budget else None)
        parts[client] = MailboxParticipation(mailbox, session, budget=budget)
    coordinator = Coordinator(mailbox, clock=lambda: 1.0)
    message, longest = b"", 0.0
    for round in range(rounds + 1):
        for client, part in parts.items():
            work = part.next()
            if work is None:
                raise RuntimeError(f"No work in {folder}.")
            step = 0.1 * torch.randn(schema.num_params, generator=generator)
            longest = max(longest, float(step.norm()))
            result = LocalResult(work.adapter + step, None, 5, {}, variate=None if work.variate is None else step)
            part.complete(work, result)
            part.uplink.background.wait()
            if client == BAD and round == rounds:  # the good ones' alone lie there; this is where mutations start
                path = folder / "updates" / f"{round:06d}" / f"{BAD}.safetensors"
                message = path.read_bytes()
                path.unlink()
        if round < rounds:
            coordinator.close_round()
    return Template(folder, rounds, message, longest)


def run_case(stage: Stage, seed: int) -> str:
    """One case; returns how it ended, `PROBLEM ...` where it may not end like that."""
    draw = random.Random(seed)
    template = draw.choice(stage.templates)
    with tempfile.TemporaryDirectory(prefix="case-", dir=stage.root, ignore_cleanup_errors=True) as folder:
        box, here = Path(folder) / "box", Path(folder) / "here"
        here.mkdir()
        shutil.copytree(template.folder, box)
        what = ", ".join(
            _attack(draw, template, box, stage.root / hostile.SECRET) for _ in range(draw.choice((1, 2, 4)))
        )
        start = time.monotonic()
        with stage.watch.over(
            [rf"{re.escape(str(box))}(/.*)?", r"/dev/shm/[^/]*", r"/tmp/[^/]*"], box, here
        ) as problems:
            try:
                with hostile.limited():
                    end = _serve(box, template, card=draw.random() < CARD_SHARE)
            except hostile.Hang as error:
                end = f"PROBLEM hang: {error}"
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                end = f"PROBLEM {type(error).__name__}: {error!s:.300}"
        _make_removable(box)
    if problems:
        end = f"PROBLEM {problems[0]}"
    if end.startswith("PROBLEM"):
        return f"{end} [{template.folder.name}: {what}; {time.monotonic() - start:.1f} s]"
    return end


def _serve(box: Path, template: Template, *, card: bool) -> str:
    """What `fedfstq serve --once` does, started anew; the deadline of the round has not passed."""
    from fedfstq_hf.federation import adapter_file
    from fedfstq_hf.federation.mailbox.folder import FolderMailbox
    from fedfstq_hf.federation.server.coordinator import Coordinator
    from fedfstq_hf.generation.shared_saliency import join_saliency
    from fedfstq_hf.reporting.card.federation_card import card_maker

    mailbox = FolderMailbox(box, durable=False)
    make = partial(
        Coordinator, mailbox, clock=lambda: 2.0, card=card_maker("fuzzed") if card else None, saliency=join_saliency
    )
    coordinator = make()
    before = coordinator.adapter.clone()
    record = coordinator.serve(once=True)
    if record.round != template.round + 1:
        return f"PROBLEM round {template.round + 1} was not closed"
    if missing := [client for client in GOOD if client not in {entry.client_id for entry in record.accepted}]:
        return f"PROBLEM the update of {missing[0]} was left out: {[r.reason for r in record.refused]}"
    adapter_file.load((box / "adapter_model.safetensors").read_bytes(), expected_sha256=record.adapter_sha256)
    moved = float((coordinator.adapter - before).norm())
    if not moved <= 40 * template.longest:  # ten times the median, and a mean of three; the rest is coding noise
        return f"PROBLEM the adapter moved by {moved:.3g}; good updates have {template.longest:.3g}"
    make()  # the next start reads all of it again
    if any(entry.client_id == BAD for entry in record.accepted):
        return "closed with its update"
    if any(entry.client_id == BAD for entry in (*record.refused, *record.late)):
        return "closed, its update refused"
    return "closed without it"


def _attack(draw: random.Random, template: Template, box: Path, secret: Path) -> str:
    """Put something into the mailbox; returns what, for the report."""
    place = draw.choices(
        ("message", "object", "refinement", "attachment", "metrics", "stray"), (45, 12, 10, 10, 18, 5)
    )[0]
    round = template.round if draw.random() < 0.7 else draw.choice((0, 1, 2, 7, 10**6))
    path = box / "updates" / f"{round:06d}" / f"{BAD}.safetensors"
    match place:
        case "message" | "refinement":
            if place == "refinement":
                path = box / "refinements" / f"{draw.choice((0, round, max(0, round - 1))):06d}" / path.name
            hostile.write(path, _message(draw, template.message), box)
        case "object":
            place = f"object: {hostile.plant(draw, path, template.message, secret)}"
        case "attachment":
            path = box / "attachments" / BAD / draw.choice(("saliency.safetensors", "x", "-"))
            if draw.random() < 0.5:
                place = f"attachment: {hostile.plant(draw, path, _attachment(draw), secret)}"
            else:
                hostile.write(path, _attachment(draw), box)
        case "metrics":
            folder = draw.choice((f"{template.round:06d}", "000000", "000001", "999999", "x", "-1"))
            path = box / "metrics" / folder / draw.choice(("x.json", f"{BAD}.json", "\u202e.json", "a" * 80 + ".json"))
            data = hostile.dump(hostile.mutate_json(draw, {"eval_loss": 3.0, "exact_match": 1.0}, str(secret)))
            if draw.random() < 0.3:
                place = f"metrics: {hostile.plant(draw, path, data, secret)}"
            else:
                hostile.write(path, hostile.mutate_bytes(draw, data) if draw.random() < 0.2 else data, box)
        case _:
            name = draw.choice((".tmp-x-1-00000000", "a b.safetensors", f"{BAD}.safetensors.part", "x" * 200, ".lock"))
            place = f"stray: {hostile.plant(draw, path.parent / name, b'x', secret)}"
    return place


def _message(draw: random.Random, data: bytes) -> bytes:
    """Mutated as it travels, or in its payload or header and packed again with a valid digest."""
    import dataclasses

    from fedfstq_hf.codec import message
    from fedfstq_hf.errors import FedFSTQError

    if draw.random() < 0.3:
        return hostile.mutate_bytes(draw, data)
    header, payload = message.unpack(data)
    if draw.random() < 0.7:
        payload = hostile.mutate_bytes(draw, payload)
    if draw.random() < 0.4:
        fields = dataclasses.asdict(header)
        name = draw.choice(sorted(fields))
        fields[name] = hostile.odd_value(draw, hostile.SECRET)
        try:
            return message.pack(message.Header(**fields), payload)
        except (FedFSTQError, TypeError, ValueError, OverflowError, AttributeError, RecursionError, UnicodeError):
            pass  # what our own writer refuses to write
    return message.pack(header, payload)


def _attachment(draw: random.Random) -> bytes:
    """A file of token sensitivities, mutated."""
    import torch
    from safetensors.torch import save

    size = draw.choice((4, 8, 1000))
    scores = torch.rand(size, generator=torch.Generator().manual_seed(draw.randrange(2**31)))
    tensors = {"levels": torch.full((-(-size // 4),), 0b01010101, dtype=torch.uint8), "scores": (255 * scores).byte()}
    fields = {"base": {}, "format": 1, "high": 1.0, "low": 0.0, "tokenizer": "t", "vocab_size": size}
    text = hostile.dump(hostile.mutate_json(draw, fields, hostile.SECRET) if draw.random() < 0.7 else fields)
    data = save(tensors, metadata={"saliency": text.decode("utf-8", "replace")})
    return hostile.mutate_bytes(draw, data) if draw.random() < 0.3 else data


def _make_removable(box: Path) -> None:
    for path in box.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(0o600)


_stage: Stage | None = None


def batch(root: str, first: int, count: int) -> hostile_run.Outcome:
    """A worker's share; the first of a process makes its stage, and honest cases warm up what imports lazily."""
    global _stage
    if _stage is None:
        logging.disable(logging.CRITICAL)
        _stage = make_stage(Path(tempfile.mkdtemp(prefix="worker-", dir=root)))
        for template in _stage.templates:
            with tempfile.TemporaryDirectory(dir=_stage.root) as folder:
                box = Path(folder) / "box"
                shutil.copytree(template.folder, box)
                end = _serve(box, template, card=True)
                if end.startswith("PROBLEM"):
                    raise RuntimeError(f"The honest federation {template.folder.name}: {end}")
        hostile_run.limit_memory(MAX_GROWTH)
    stage = _stage
    return hostile_run.run_batch(lambda seed: run_case(stage, seed), root, first, count)


if __name__ == "__main__":
    sys.exit(hostile_run.run_all(batch, hostile_run.arguments(__doc__)))
