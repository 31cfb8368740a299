"""A federation of tiny models in a folder, clients' Trainers in it, and a participation that needs no mailbox."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from specs import flat_spec
from tiny import make_arguments, make_tiny_data, make_tiny_model

from fedfstq_hf import FedFSTQConfig, FedFSTQTrainer
from fedfstq_hf.adapter import AdapterView, base_fingerprint, config_json
from fedfstq_hf.federation import adapter_file
from fedfstq_hf.federation.client.participation import Assignment, local_seed
from fedfstq_hf.federation.client.session import ClientSession
from fedfstq_hf.federation.founding import found_federation
from fedfstq_hf.federation.mailbox.folder import FolderMailbox
from fedfstq_hf.federation.server.coordinator import Coordinator
from fedfstq_hf.federation.spec import FederationSpec


def make_spec(model: Any, **changes: Any) -> FederationSpec:
    settings: dict[str, Any] = {
        "name": "tiny",
        "model": "org/tiny",
        "base_fingerprint": base_fingerprint(model),
        "schema": AdapterView(model).schema.fingerprint,
        "rounds": 2,
        "local_steps": 2,
        "max_message_bytes": 100_000,
        "codec": "fp32",
    }
    return flat_spec(**(settings | changes))


def found(path: Path, model: Any = None, **changes: Any) -> FolderMailbox:
    """Round 0 of a federation that starts from the model's adapter."""
    model = model or make_tiny_model()
    view = AdapterView(model)
    mailbox = FolderMailbox(path, durable=False)
    found_federation(
        mailbox, make_spec(model, **changes), adapter_file.dump(view.state()), config_json(model, view.name)
    )
    return mailbox


def make_trainer(
    tmp_path: Path,
    mailbox: FolderMailbox | None = None,
    *,
    model: Any = None,
    data: Any = None,
    client_id: str = "a",
    arguments: dict[str, Any] | None = None,
    wait_seconds: float = 30,
    **config: Any,
) -> Any:
    """A client's Trainer; without a mailbox, for local training."""
    address = None if mailbox is None else str(mailbox.path)
    federation = FedFSTQConfig(
        mailbox=address, client_id=client_id, poll_seconds=0.01, wait_seconds=wait_seconds, **config
    )
    return FedFSTQTrainer(
        model=model or make_tiny_model(),
        args=make_arguments(tmp_path / client_id, **(arguments or {})),
        train_dataset=make_tiny_data(7) if data is None else data,
        federation=federation,
    )


def serve(mailbox: FolderMailbox) -> threading.Thread:
    """A coordinator in a thread; join it after the clients."""
    thread = threading.Thread(target=lambda: Coordinator(mailbox).serve(poll_seconds=0.01), daemon=True)
    thread.start()
    return thread


def run(tmp_path: Path, mailbox: FolderMailbox, **options: Any) -> Any:
    """A federation from its first round to its last, of one client, whose Trainer is returned."""
    thread = serve(mailbox)
    trainer = make_trainer(tmp_path, mailbox, **options)
    trainer.train()
    thread.join(30)
    assert not thread.is_alive()
    return trainer


def snapshot(path: Path, mailbox: FolderMailbox) -> list[str]:
    """Digests of all messages and of the adapter at the mailbox's root."""
    messages = [
        mailbox.read_update(ref, max_bytes=10**9)
        for round in range(mailbox.head())
        for ref in mailbox.list_updates(round)
    ]
    return [hashlib.sha256(data).hexdigest() for data in (*messages, (path / "adapter_model.safetensors").read_bytes())]


class Listed:
    """A participation that hands out given rounds of one client from an adapter in memory."""

    def __init__(self, model: Any, hands_out: Iterable[int], **spec: Any) -> None:
        self.view = AdapterView(model)
        self.spec = make_spec(model, **spec)
        self.session = ClientSession("a", self.spec, self.view.schema)
        self.rounds = list(hands_out)
        self.total_steps = len(self.rounds) * self.spec.local_steps
        self.adapter = self.view.read()
        self.results: list[Any] = []

    def next(self) -> Assignment | None:
        if not self.rounds:
            return None
        round = self.rounds.pop(0)
        return Assignment(
            round=round,
            session=self.session,
            adapter=self.adapter,
            adapter_sha256="",
            seed=local_seed(self.spec.seed, "a", round),
        )

    def complete(self, assignment: Assignment, result: Any) -> dict[str, float]:
        self.results.append(result)
        self.adapter = result.adapter
        self.session.carried = result.carried
        return {"fed_round": assignment.round}

    def final_adapter(self) -> torch.Tensor | None:
        return None


def take_part(
    tmp_path: Path,
    rounds: Iterable[int] = (0,),
    *,
    spec: dict[str, Any] | None = None,
    model: Any = None,
    **options: Any,
) -> tuple[Any, Listed]:
    """A Trainer after these rounds, and what it gave away in them."""
    model = model or make_tiny_model()
    participation = Listed(model, rounds, **(spec or {}))
    trainer = make_trainer(tmp_path, model=model, **options)
    trainer.take_part(participation, participation.spec)
    return trainer, participation


def batch_of(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels", "attention_mask")}
