"""Local training of a tiny model, and what is watched in it."""

from __future__ import annotations

from typing import Any

import torch
from specs import flat_spec
from tiny import make_arguments, make_tiny_data, make_tiny_model
from transformers import TrainerCallback

from fedfstq_hf import FedFSTQConfig, FedFSTQTrainer
from fedfstq_hf.adapter import AdapterView, base_fingerprint
from fedfstq_hf.federation.client.participation import Assignment, local_seed
from fedfstq_hf.federation.client.session import ClientSession


def ragged_data(num: int = 16, length: int = 12, seed: int = 0) -> list[dict[str, list[int]]]:
    """Rows of different lengths with 1 to 10 target tokens each."""
    rows = []
    for number, row in enumerate(make_tiny_data(num, length=length, seed=seed)):
        size, kept = length - number % 3, 1 + (7 * number) % 9
        ids = row["input_ids"][:size]
        rows.append({"input_ids": ids, "labels": [-100] * (size - kept) + ids[size - kept :]})
    return rows


class Padded:
    """Pads each batch to its own longest row, on the right."""

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        width = max(len(row["input_ids"]) for row in rows)
        fill = {"input_ids": 0, "labels": -100}
        batch = {
            name: torch.tensor([row[name] + [value] * (width - len(row[name])) for row in rows])
            for name, value in fill.items()
        }
        batch["attention_mask"] = torch.tensor([[int(t < len(row["input_ids"])) for t in range(width)] for row in rows])
        return batch


class Watch(TrainerCallback):  # type: ignore[misc]
    """Adapter gradients before each optimizer step, (num_params,) in double precision, and the logged losses."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.gradients: list[torch.Tensor] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        parts = self.trainer.adapter_view.gradients()
        self.gradients.append(torch.cat([part.detach().double().reshape(-1) for part in parts]))

    @property
    def losses(self) -> list[float]:
        return [row["loss"] for row in self.trainer.state.log_history if "loss" in row]


def make_trainer(tmp_path: Any, *, model: Any = None, data: Any = None, arguments: Any = None, **config: Any) -> Any:
    """A trainer without a mailbox, and its watch; the same examples in the same order however they are batched."""
    settings = {
        "train_sampling_strategy": "sequential",
        "logging_strategy": "steps",
        "logging_steps": 1,
        "max_grad_norm": 0.0,
    }
    trainer = FedFSTQTrainer(
        model=model or make_tiny_model(),
        args=make_arguments(tmp_path, **(settings | (arguments or {}))),
        train_dataset=ragged_data() if data is None else data,
        data_collator=Padded(),
        federation=FedFSTQConfig(**config),
    )
    watch = Watch(trainer)
    trainer.add_callback(watch)
    return trainer, watch


class Listed:
    """A participation that hands out rounds of one client from an adapter in memory."""

    total_steps: int

    def __init__(self, model: Any, rounds: int, **spec: Any) -> None:
        self.view = AdapterView(model)
        settings: dict[str, Any] = {
            "name": "tiny",
            "model": "org/tiny",
            "base_fingerprint": base_fingerprint(model),
            "schema": self.view.schema.fingerprint,
            "rounds": rounds,
            "local_steps": 3,
            "max_message_bytes": 100_000,
            "codec": "fp32",
        }
        self.spec = flat_spec(**(settings | spec))
        self.session = ClientSession("a", self.spec, self.view.schema)
        self.total_steps = rounds * self.spec.local_steps
        self.adapter = self.view.read()
        self.starts: list[torch.Tensor] = []
        self.results: list[Any] = []

    def next(self) -> Assignment | None:
        round = len(self.results)
        if round == self.spec.rounds:
            return None
        self.starts.append(self.adapter)
        return Assignment(
            round=round, session=self.session, adapter=self.adapter, adapter_sha256="", seed=local_seed(0, "a", round)
        )

    def complete(self, assignment: Assignment, result: Any) -> dict[str, float]:
        self.results.append(result)
        self.adapter, self.session.carried = result.adapter, result.carried
        return {"fed_round": assignment.round}

    def final_adapter(self) -> torch.Tensor | None:
        return None
