"""What each of two processes does in `test_processes.py`; started by `accelerate launch` with a folder.

Writes what it saw into `FOLDER/rank-RANK.pt`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from local_training import Padded, ragged_data
from small_federation import Gradients, settings_of
from tiny import make_arguments, make_tiny_model
from transformers import AutoTokenizer, TrainerCallback

from fedfstq_hf import FedFSTQConfig, FedFSTQTrainer
from fedfstq_hf.demo import model_path
from fedfstq_hf.errors import MailboxError
from fedfstq_hf.federation.mailbox.folder import FolderMailbox
from fedfstq_hf.methods import OBJECTIVES

KINDS = (*OBJECTIVES, "sft") if importlib.util.find_spec("trl") else OBJECTIVES
ONE_STEP = {"max_grad_norm": 0.0, "learning_rate": 0.0, "max_steps": 2, "train_sampling_strategy": "sequential"}


class Killed(Exception):
    """Stands for whatever ends all processes at once."""


class KillAt(TrainerCallback):  # type: ignore[misc]
    """Ends training where step `step` begins."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise Killed


def make_trainer(folder: Path, federation: FedFSTQConfig, *, steps: int, **arguments: Any) -> FedFSTQTrainer:
    """Of a client with 16 ragged rows, 4 in a micro-batch."""
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": steps, **arguments}
    return FedFSTQTrainer(
        model=make_tiny_model(),
        args=make_arguments(folder, **settings),
        train_dataset=ragged_data(),
        data_collator=Padded(),
        federation=federation,
    )


def watched(folder: Path, *, steps: int, **options: Any) -> dict[str, Any]:
    """Two steps of 16 examples without moving: gradients, Fisher information and token sensitivity."""
    federation = settings_of(None, refresh_steps=2, **options)
    return gradients_of(make_trainer(folder, federation, steps=steps, **ONE_STEP))


def without_counts(trainer: Any) -> None:
    """As with a model that takes no `num_items_in_batch`: each micro-batch has a mean of its own."""
    trainer.model_accepts_loss_kwargs = False


def without_filter(trainer: Any) -> None:
    """The same, and the loss is the model's."""
    trainer.model_accepts_loss_kwargs, trainer._steps.filter = False, None


def with_counts_of_its_own(trainer: Any) -> None:
    """Each process divides by its own target tokens."""
    trainer.args.average_tokens_across_devices = False


NORMALISED = {kind.__name__: kind for kind in (without_counts, without_filter, with_counts_of_its_own)}


def sensitivity_normalised(folder: Path, kind: str) -> Any:
    """Token sensitivity where the loss is divided in another way: (vocab_size,)."""
    trainer = make_trainer(folder, settings_of(None, refresh_steps=2), steps=2, **ONE_STEP)
    NORMALISED[kind](trainer)
    return gradients_of(trainer)["tokens"]


def watched_sft(folder: Path, *, steps: int, **options: Any) -> dict[str, Any]:
    """The same of TRL's trainer."""
    from trl import SFTConfig

    from fedfstq_hf import FedFSTQSFTTrainer

    trainer = FedFSTQSFTTrainer(
        model=make_tiny_model(),
        args=SFTConfig(
            **make_arguments(folder, per_device_train_batch_size=4, gradient_accumulation_steps=steps).to_dict()
            | ONE_STEP
            | {"bf16": False, "use_cpu": True, "max_length": 16}
        ),
        train_dataset=Dataset.from_list(ragged_data()),
        processing_class=AutoTokenizer.from_pretrained(model_path()),
        data_collator=Padded(),
        federation=settings_of(None, refresh_steps=2, **options),
    )
    return gradients_of(trainer)


def gradients_of(trainer: Any) -> dict[str, Any]:
    """Trains in double precision; what each step's gradients were, and what was read off them."""
    trainer.model.double()
    gradients = Gradients(trainer.adapter_view)
    trainer.add_callback(gradients)
    trainer.train()
    tokens = trainer.sensitivity.scores()
    return {"gradients": gradients.seen, "fisher": trainer.adapter_fisher.vector().double(), "tokens": tokens.double()}


def federated(folder: Path, mailbox: FolderMailbox, *, steps: int, kill_at: int | None) -> dict[str, Any]:
    """A whole federation, in one process or two; killed on the way and resumed in the middle of a round."""

    def start() -> FedFSTQTrainer:
        trainer = make_trainer(folder, settings_of(mailbox), steps=steps, save_strategy="steps", save_steps=1)
        trainer._processes.heartbeat_seconds = 0.02
        return trainer

    if kill_at is not None:
        killed = start()
        killed.add_callback(KillAt(kill_at))
        with contextlib.suppress(Killed):
            killed.train()
    trainer = start()
    trainer.train(resume_from_checkpoint=kill_at is not None)
    outcomes = [settlement.outcome for settlement in trainer.settlements]
    return {"adapter": trainer.adapter_view.read(), "outcomes": outcomes, "steps": trainer.state.global_step}


def main(folder: Path) -> None:
    """Everything that the test looks at, in one launch."""
    seen: dict[str, Any] = {}
    for objective in OBJECTIVES:
        seen[objective] = watched(folder / objective, steps=2, objective=objective)
    for kind in NORMALISED:
        seen[kind] = sensitivity_normalised(folder / kind, kind)
    if "sft" in KINDS:
        seen["sft"] = watched_sft(folder / "sft", steps=2, objective="unbiased")
    seen["federated"] = federated(folder / "two", FolderMailbox(folder / "two-box"), steps=2, kill_at=4)
    try:
        make_trainer(folder, settings_of(FolderMailbox(folder / "nowhere")), steps=2).train()
    except MailboxError as error:
        seen["error"] = str(error)
    rank = torch.distributed.get_rank()
    torch.save(seen, folder / f"rank-{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
