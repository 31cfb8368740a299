"""The rounds of one long `Trainer.train()`: which comes next, its data order, its schedule, its optimizer state."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate import skip_first_batches
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Sampler

from fedfstq_hf.errors import DataError
from fedfstq_hf.federation.client.participation import Assignment, Participation
from fedfstq_hf.federation.spec import FederationSpec
from fedfstq_hf.trainer.checkpoint import Saved

logger = logging.getLogger(__name__)

_OPTIMIZER = "optimizer"


class Rounds:
    """What a trainer knows of its federation while it takes part.

    Args:
        participation: hands rounds out, and takes what comes of them.
        spec: what the federation shares.

    Attributes:
        assignment: the round at hand; None between two rounds.
        batches: of that round.
        ended: no round is left.
        resumes_within: the checkpoint that training went on from was taken in the middle of the round at hand.
    """

    def __init__(self, participation: Participation, spec: FederationSpec) -> None:
        self.participation, self.spec = participation, spec
        self.assignment: Assignment | None = None
        self.batches: Iterator[Any] = iter(())
        self.ended = self.resumes_within = False
        self._upcoming: tuple[Assignment | None, ...] = ()  # the first, where it was asked for before training began
        self._resumed: Saved | None = None

    def choose(self, saved: Saved | None) -> str | None:
        """The checkpoint folder that training goes on from; None where its past is not this federation's."""
        if saved is None:
            return None
        self._upcoming = (self.participation.next(),)
        if not saved.leads_to(self._upcoming[0], self.spec):
            logger.info("%s is of another federation or of a later round: the round at hand starts anew.", saved.folder)
            return None
        self._resumed = saved
        return saved.folder

    def next(self) -> Assignment | None:
        """Wait for the next round, which is then at hand; None ends the training."""
        if self._upcoming:
            (self.assignment,), self._upcoming = self._upcoming, ()
        else:
            self.assignment = self.participation.next()
        self.ended = self.assignment is None
        return self.assignment

    def resumed(self, assignment: Assignment) -> Saved | None:
        """The checkpoint that training goes on from, before its first round; later None."""
        saved, self._resumed = self._resumed, None
        self.resumes_within = saved is not None and saved.within(assignment)
        return saved

    def place(self) -> dict[str, Any]:
        """Fields of a checkpoint's `Place`."""
        if self.assignment is None:
            return {"federation": self.spec.id}
        base = self.assignment.adapter_sha256
        return {"federation": self.spec.id, "round": self.assignment.round, "adapter_sha256": base}


def check_dataset(dataset: Any, client_id: str) -> None:
    """Refuse what no round can be drawn from.

    Raises:
        DataError: it is empty, or of unknown length.
    """
    if dataset is None or not hasattr(dataset, "__len__"):
        raise DataError("A federated client needs a train_dataset of known length; materialise a streaming one first.")
    if len(dataset) == 0:
        raise DataError(f"The training data of client {client_id!r} is empty: it cannot take part.")


class RoundSampler(Sampler[int]):
    """The examples of one client's round: as many passes as it takes, each in an order of its own.

    Args:
        num_examples: size of the client's data set.
        num_samples: indices to draw.
        seed: the order depends on it and on nothing else.
    """

    def __init__(self, num_examples: int, num_samples: int, seed: int) -> None:
        self.num_examples = num_examples
        self.num_samples = num_samples
        self.seed = seed

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed)
        passes = -(-self.num_samples // self.num_examples)
        order = torch.cat([torch.randperm(self.num_examples, generator=generator) for _ in range(passes)])
        return iter(order[: self.num_samples].tolist())


def skip_batches(loader: Any, count: int) -> Any:
    """The loader without its first `count` batches, which are not collated either."""
    return skip_first_batches(loader, count) if count else loader


def set_schedule(scheduler: Any, step: int) -> None:
    """Put a learning-rate schedule at a step of the federation, for a client that skipped rounds or repeats one.

    Schedules that look at metrics instead of steps stay as they are.
    """
    if not isinstance(scheduler, LambdaLR):
        return
    scheduler.last_epoch = step
    rates = [base * factor(step) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates


def dump_optimizer(optimizer: Any, parameters: Sequence[Tensor]) -> dict[str, Tensor]:
    """The optimizer's state per parameter, as `optimizer.INDEX.NAME`; plain numbers (a step counter) end in `#`."""
    dumped: dict[str, Tensor] = {}
    for index, parameter in enumerate(parameters):
        for name, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                dumped[f"{_OPTIMIZER}.{index}.{name}"] = value.detach().clone()
            elif isinstance(value, (int, float)):
                dtype = torch.float64 if isinstance(value, float) else None
                dumped[f"{_OPTIMIZER}.{index}.{name}#"] = torch.tensor(value, dtype=dtype)
    return dumped


def load_optimizer(optimizer: Any, parameters: Sequence[Tensor], carried: Mapping[str, Tensor]) -> None:
    """Set the optimizer's state to what `dump_optimizer` returned; without any, to a fresh one."""
    optimizer.state.clear()
    for key, value in carried.items():
        if not key.startswith(f"{_OPTIMIZER}."):
            continue
        _, index, name = key.split(".", 2)
        parameter = parameters[int(index)]
        if name.endswith("#"):
            optimizer.state[parameter][name[:-1]] = value.item()
        else:
            optimizer.state[parameter][name] = value.clone() if name == "step" else value.clone().to(parameter.device)
