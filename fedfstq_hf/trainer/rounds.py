"""The rounds of one long `Trainer.train()`: which comes next, its batches, its schedule, its optimizer state."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from accelerate import skip_first_batches
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Sampler
from transformers.trainer_utils import has_length

from fedfstq_hf.errors import ConfigError, DataError
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
        data: its batches.
        ended: no round is left.
        resumes_within: the checkpoint that training went on from was taken in the middle of the round at hand.
    """

    def __init__(self, participation: Participation, spec: FederationSpec) -> None:
        self.participation, self.spec = participation, spec
        self.assignment: Assignment | None = None
        self.data = RoundData(spec.local_steps)
        self.ended = self.resumes_within = False
        self._upcoming: tuple[Assignment | None, ...] = ()  # the first, where it was asked for before training began
        self._resumed: Saved | None = None

    def choose(self, saved: Saved | None) -> str | None:
        """The checkpoint folder that training goes on from; None where its past is not this federation's."""
        if saved is None:
            return None
        if not saved.leads_to(self.peek(), self.spec):
            logger.info("%s is of another federation or of a later round: the round at hand starts anew.", saved.folder)
            return None
        self._resumed = saved
        return saved.folder

    def peek(self) -> Assignment | None:
        """Wait for the next round, without beginning it."""
        if not self._upcoming:
            self._upcoming = (self.participation.next(),)
        return self._upcoming[0]

    def next(self) -> Assignment | None:
        """Wait for the next round, which is then at hand; None ends the training."""
        self.assignment, self._upcoming = self.peek(), ()
        self.ended = self.assignment is None
        return self.assignment

    def restart(self) -> None:
        """Begin the round at hand once more: the Trainer's loop starts anew, with a smaller batch."""
        if self.assignment is not None:
            self._upcoming, self.assignment = (self.assignment,), None

    def check_end(self, steps: int, *, asked: bool) -> None:
        """Raise `ConfigError` if training ended after `steps` steps of a round, and no callback `asked` for it."""
        if self.assignment is not None and not asked:
            raise ConfigError(
                f"Training ended within round {self.assignment.round}, after {steps} of {self.spec.local_steps} local "
                "steps, and nobody asked for it: nothing of the round was sent. Keep the callbacks that this trainer "
                "adds itself, and remove others by remove_callback()."
            )

    def resumed(self) -> Saved | None:
        """The checkpoint that training goes on from, before its first round; later None."""
        saved, self._resumed = self._resumed, None
        self.resumes_within = saved is not None and self.assignment is not None and saved.within(self.assignment)
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
        DataError: there is none, or it is empty.
    """
    if dataset is None:
        raise DataError(f"Client {client_id!r} has no training data: pass train_dataset to the trainer.")
    if has_length(dataset) and len(dataset) == 0:
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


class RoundData:
    """The batches of a client's rounds, from one data loader with one set of worker processes.

    The order of a round depends on its seed alone, unless the client has a data loader, a sampler or a sampling
    strategy of its own: such a loader is run through again, as often as the round's local steps take. A stream goes on
    from round to round.

    Args:
        local_steps: optimizer steps of a round.

    Attributes:
        make_loader: the Trainer's own; asked where data set or batch size are others than in the last round.
    """

    def __init__(self, local_steps: int) -> None:
        self.sampler: RoundSampler | None = None
        self.make_loader: Callable[[], Any] | None = None
        self._local_steps = local_steps
        self._made_for: tuple[Any, int] | None = None  # data set and batch size
        self._loader: Any = None
        self._batches: Iterator[Any] = iter(())
        self._is_stream = False

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return next(self._batches)

    def order(self, trainer: Any, dataset: Any, seed: int) -> RoundSampler:
        """The sampler of a round, which the loader keeps."""
        rows = trainer._train_batch_size * trainer.args.gradient_accumulation_steps * trainer.args.world_size
        self.sampler = RoundSampler(len(dataset), self._local_steps * rows, seed)
        return self.sampler

    def begin(self, trainer: Any, seed: int, skip: int) -> None:
        """Begin a round, without its first `skip` batches.

        Args:
            trainer: whose data and batch size they are.
            seed: of the order.
            skip: micro-batches that were trained on before a restart.
        """
        dataset, size = trainer.train_dataset, trainer._train_batch_size
        if self._made_for is None or self._made_for[0] is not dataset or self._made_for[1] != size:
            self._forget(trainer.accelerator)
            self._loader, self._made_for = cast("Callable[[], Any]", self.make_loader)(), (dataset, size)
            self._is_stream = not has_length(dataset)
        elif self._is_stream:
            return
        elif self._loader.persistent_workers:
            torch.empty((), dtype=torch.int64).random_()  # a loader that starts its workers draws a number for them
        if self.sampler is None:
            self._batches = _endless(self._loader, skip)
        else:
            self.sampler.seed = seed
            self._batches = iter(skip_first_batches(self._loader, skip) if skip else self._loader)

    def end(self) -> None:
        """Leave the loader as Accelerate wants it left, between two passes."""
        if self.sampler is not None:
            next(self._batches, None)  # the loader is exhausted, and closes itself
            self._batches = iter(())

    def _forget(self, accelerator: Any) -> None:
        """Let the former loader go, with its worker processes."""
        self.end()
        self.sampler, self._batches = None, iter(())
        if self._loader is not None:
            with contextlib.suppress(ValueError):
                accelerator._dataloaders.remove(self._loader)
            self._loader = None


def placeholder(length: int) -> DataLoader[Any]:
    """Stands for a round's batches where the Trainer asks for their number, and is not read."""
    return DataLoader(range(length), generator=torch.Generator())  # type: ignore[arg-type]  # not the round's


def _endless(loader: Any, skip: int) -> Iterator[Any]:
    while True:
        empty = True
        for batch in loader:
            empty = False
            if skip:
                skip -= 1
            else:
                yield batch
        if empty:
            raise DataError(
                "The client's data loader gave no batch: there is nothing to train on. Check train_dataset, its "
                "sampler, and dataloader_drop_last with a batch larger than the data."
            )


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


class OptimizerState:
    """What an optimizer keeps, per parameter and beside them, as tensors that a session can carry.

    A schedule-free optimizer counts its steps in its parameter groups. The names are `optimizer.INDEX.NAME` and
    `optimizer.group.INDEX.NAME`; plain numbers end in `#`.

    Args:
        optimizer: before its first step.
    """

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self._fresh = [{name: copy.deepcopy(group[name]) for name in _kept(group)} for group in optimizer.param_groups]

    def dump(self, parameters: Sequence[Tensor]) -> dict[str, Tensor]:
        """All of it.

        Raises:
            ConfigError: the optimizer keeps something else than tensors and numbers.
        """
        dumped: dict[str, Tensor] = {}
        held = [(str(i), self.optimizer.state.get(parameter, {})) for i, parameter in enumerate(parameters)]
        for i, (group, fresh) in enumerate(zip(self.optimizer.param_groups, self._fresh, strict=False)):
            held.append((f"group.{i}", {n: group[n] for n in _kept(group) if not _same(group[n], fresh.get(n))}))
        for place, values in held:
            for name, value in values.items():
                key = f"{_OPTIMIZER}.{place}.{name}"
                if isinstance(value, Tensor):
                    dumped[key] = value.detach().clone()
                elif isinstance(value, (bool, int, float)):
                    dtype = torch.float64 if isinstance(value, float) else None
                    dumped[f"{key}#"] = torch.tensor(value, dtype=dtype)
                elif value is not None:
                    raise ConfigError(
                        f"The optimizer keeps {name}, a {type(value).__name__}, which cannot be carried from round to "
                        "round. Found the federation with optimizer_state: fresh, or take another optim."
                    )
        return dumped

    def load(self, parameters: Sequence[Tensor], carried: Mapping[str, Tensor]) -> None:
        """Set it to what `dump` returned; without any, to that of a fresh optimizer."""
        self.optimizer.state.clear()
        for group, fresh in zip(self.optimizer.param_groups, self._fresh, strict=False):
            for name in set(_kept(group)) - set(fresh):
                del group[name]
            group.update(copy.deepcopy(fresh))
        for key, value in carried.items():
            if not key.startswith(f"{_OPTIMIZER}."):
                continue
            place, _, name = key.removeprefix(f"{_OPTIMIZER}.").rpartition(".")
            if place.startswith("group."):
                state = self.optimizer.param_groups[int(place.removeprefix("group."))]
            else:
                state = self.optimizer.state[parameters[int(place)]]
                if name != "step":
                    value = value.to(parameters[int(place)].device)
            state[name.removesuffix("#")] = value.item() if name.endswith("#") else value.clone()


def settle(optimizer: Any) -> None:
    """One that trains at another point than its result (schedule-free) sets the model to the result."""
    if callable(evaluate := getattr(optimizer, "eval", None)):
        evaluate()


def _kept(group: Mapping[str, Any]) -> list[str]:
    """What of a parameter group an optimizer may keep; rates are the schedule's."""
    return [name for name in group if name not in ("params", "lr", "initial_lr")]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)
