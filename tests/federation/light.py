"""A federation without a model: real mailbox, sessions, codec and coordinator; local training is a pure function."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import torch
from specs import flat_spec
from torch import Tensor

from fedfstq_hf.codec import Schema
from fedfstq_hf.codec.budget import MessageBudget
from fedfstq_hf.federation import adapter_file
from fedfstq_hf.federation.client.participation import LocalResult, MailboxParticipation
from fedfstq_hf.federation.client.session import ClientSession
from fedfstq_hf.federation.control import Control
from fedfstq_hf.federation.founding import found_federation
from fedfstq_hf.federation.mailbox.folder import FolderMailbox
from fedfstq_hf.federation.mailbox.protocol import Mailbox
from fedfstq_hf.federation.server.coordinator import Coordinator
from fedfstq_hf.federation.spec import FederationSpec

SHAPES = {"layer.lora_A.weight": (4, 24), "layer.lora_B.weight": (24, 4)}


def initial_state(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


SCHEMA = Schema.from_state_dict(initial_state())


def make_spec(**changes: object) -> FederationSpec:
    settings: dict[str, object] = {
        "name": "light",
        "model": "none",
        "base_fingerprint": {},
        "schema": SCHEMA.fingerprint,
        "rounds": 2,
        "local_steps": 1,
        "max_message_bytes": 4096,
        "min_clients": 2,
        "codec": "fp32",
    }
    return flat_spec(**(settings | changes))


def found_in(mailbox: Mailbox, *, control: Control | None = None, now: float = 0.0, **changes: object) -> None:
    adapter = adapter_file.dump(initial_state())
    found_federation(mailbox, make_spec(**changes), adapter, b"{}\n", control=control, now=now)


def found(path: Path, *, durable: bool = False, **changes: object) -> FolderMailbox:
    mailbox = FolderMailbox(path, durable=durable)
    found_in(mailbox, **changes)
    return mailbox


def fake_training(adapter: Tensor, seed: int, carried: dict[str, Tensor]) -> LocalResult:
    """A change that depends on the adapter, the seed and what is carried, with a Fisher to weigh it."""
    generator = torch.Generator().manual_seed(seed)
    momentum = 0.5 * carried.get("momentum", torch.zeros(len(adapter))) + torch.randn(len(adapter), generator=generator)
    fisher = torch.rand(len(adapter), generator=generator)
    return LocalResult(adapter + 0.1 * (momentum - adapter), fisher, 1 + seed % 7, {"momentum": momentum})


class NothingToDo(Exception):
    """Raised instead of sleeping."""


def pause(seconds: float) -> None:
    raise NothingToDo


class LightClient:
    """One client with a real session; `step` does what can be done now, and never waits."""

    def __init__(
        self,
        mailbox: Mailbox,
        client_id: str,
        folder: Path | None,
        *,
        max_bytes: int | None = None,
        budget: MessageBudget | None = None,
    ) -> None:
        spec = FederationSpec.from_json(mailbox.read(0, "spec.json"))
        self.session = ClientSession(client_id, spec, SCHEMA, folder=folder, durable=getattr(mailbox, "durable", False))
        self.participation = MailboxParticipation(
            mailbox, self.session, budget=budget or MessageBudget(fixed=max_bytes), sleep=pause
        )
        self.done = False

    def step(self) -> bool:
        """Returns whether anything happened."""
        try:
            assignment = self.participation.next()
        except NothingToDo:
            return False
        if assignment is None:
            changed, self.done = not self.done, True
            return changed
        result = fake_training(assignment.adapter, assignment.seed, assignment.session.carried)
        if assignment.variate is not None:
            result = dataclasses.replace(result, variate=assignment.variate + result.carried["momentum"])
        self.participation.complete(assignment, result)
        return True


def run_rounds(coordinator: Coordinator, clients: list[LightClient], rounds: int | None = None) -> None:
    """Run until the federation is finished, or for that many rounds."""
    until = coordinator.spec.rounds if rounds is None else coordinator.record.round + rounds
    while coordinator.record.round < until:
        for client in clients:
            client.step()
        assert coordinator.ready()
        assert coordinator.close_round() is not None
    for client in clients:
        client.step()


def adapter_sha256(path: Path) -> str:
    return hashlib.sha256((path / "adapter_model.safetensors").read_bytes()).hexdigest()
