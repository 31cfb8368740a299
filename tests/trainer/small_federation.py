"""A federation in a folder with its coordinator in a thread, and a client's Trainer, for tests of training."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from specs import flat_spec
from transformers import TrainerCallback

from fedfstq_hf import FedFSTQConfig
from fedfstq_hf.adapter import AdapterView, base_fingerprint, config_json
from fedfstq_hf.federation import adapter_file
from fedfstq_hf.federation.founding import found_federation
from fedfstq_hf.federation.mailbox.folder import FolderMailbox
from fedfstq_hf.federation.server.coordinator import Coordinator


def found(path: Path, model: Any, **changes: Any) -> FolderMailbox:
    """Round 0 of a federation that starts from the model's adapter."""
    view = AdapterView(model)
    settings: dict[str, Any] = {
        "name": "small",
        "model": "org/small",
        "base_fingerprint": base_fingerprint(model),
        "schema": view.schema.fingerprint,
        "rounds": 2,
        "local_steps": 2,
        "max_message_bytes": 10_000_000,
        "codec": "fp32",
    }
    mailbox = FolderMailbox(path, durable=False)
    spec = flat_spec(**(settings | changes))
    found_federation(mailbox, spec, adapter_file.dump(view.state()), config_json(model, view.name))
    return mailbox


@contextlib.contextmanager
def served(mailbox: FolderMailbox) -> Iterator[None]:
    """A coordinator works within it; at its end the federation must have ended too."""
    thread = threading.Thread(target=lambda: Coordinator(mailbox).serve(poll_seconds=0.01), daemon=True)
    thread.start()
    yield
    thread.join(30)
    assert not thread.is_alive()


def settings_of(mailbox: FolderMailbox | None, **changes: Any) -> FedFSTQConfig:
    """A client's settings; without a mailbox, for local training."""
    address = None if mailbox is None else str(mailbox.path)
    return FedFSTQConfig(**({"mailbox": address, "client_id": "a", "poll_seconds": 0.01, "wait_seconds": 30} | changes))


def snapshot(mailbox: FolderMailbox) -> list[str]:
    """Digests of all messages and of the newest adapter."""
    head = mailbox.head()
    assert head is not None
    refs = [ref for round in range(head) for ref in mailbox.list_updates(round)]
    files = [mailbox.read_update(ref, max_bytes=10**9) for ref in refs]
    return [hashlib.sha256(data).hexdigest() for data in (*files, mailbox.read(head, "adapter_model.safetensors"))]


class Gradients(TrainerCallback):  # type: ignore[misc]
    """Adapter gradients before each optimizer step, (num_params,) in double precision."""

    def __init__(self, view: AdapterView) -> None:
        self.view = view
        self.seen: list[torch.Tensor] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append(torch.cat([g.detach().double().reshape(-1) for g in self.view.gradients()]))
