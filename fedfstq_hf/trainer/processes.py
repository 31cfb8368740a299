"""One federated client in several processes: rank 0 alone talks to the mailbox, the others follow it.

While rank 0 waits (for a round, for the network) it tells the others so every half minute: a collective that waits
longer than the process group's timeout, 30 minutes by default, would end them.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from fedfstq_hf.errors import ConfigError, FedFSTQError
from fedfstq_hf.federation.client.participation import Assignment, LocalResult, Participation
from fedfstq_hf.federation.client.session import ClientSession, Settlement
from fedfstq_hf.federation.spec import FederationSpec

HEARTBEAT_SECONDS = 30.0

T = TypeVar("T")


@dataclass(frozen=True)
class _Outcome(Generic[T]):
    value: T | None = None
    error: BaseException | None = None


class Processes:
    """The processes that train one model together, seen from one of them. `mean`, `window` and `joined` need several.

    Args:
        rank: of this process, from 0.
        count: of all.
        heartbeat_seconds: how often the others hear of rank 0 while it is busy.
    """

    def __init__(self, rank: int = 0, count: int = 1, *, heartbeat_seconds: float = HEARTBEAT_SECONDS) -> None:
        self.rank, self.count, self.heartbeat_seconds = rank, count, heartbeat_seconds

    def first_alone(self, work: Callable[[], T], share: Callable[[T], Any] = lambda value: value) -> T:
        """Run `work` on rank 0 alone; its result, or its error, reaches every process.

        Args:
            work: may take as long as it likes.
            share: what the other processes get of the result; must survive pickling.
        """
        if self.count == 1:
            return work()
        if self.rank > 0:
            return cast(T, self._follow())
        outcome = self._lead(work)
        if outcome.error is not None:
            self._broadcast(_Outcome(error=_portable(outcome.error)))
            raise outcome.error
        value = cast(T, outcome.value)
        self._broadcast(_Outcome(share(value)))
        return value

    def mean(self, value: float) -> float:
        """The mean of a number over the processes."""
        return float(self.joined(torch.tensor([value], dtype=torch.float64))[0].mean())

    def window(self, batches: list[Any]) -> list[Any]:
        """The micro-batches of one optimizer step in all processes, in the order that one process would have them in.

        Those of other processes hold their labels only.
        """
        parts: list[Any] = [None] * self.count
        keys = ("labels", "shift_labels")
        dist.all_gather_object(parts, [{key: batch[key].cpu() for key in keys if key in batch} for batch in batches])
        parts[self.rank] = batches
        return [batch for column in zip(*parts, strict=True) for batch in column]

    def joined(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Concatenate each tensor over the processes, in the order of their ranks, on the CPU."""
        parts: list[Any] = [None] * self.count
        dist.all_gather_object(parts, [tensor.cpu() for tensor in tensors])
        return tuple(torch.cat(pieces) for pieces in zip(*parts, strict=True))

    def _lead(self, work: Callable[[], T]) -> _Outcome[T]:
        outcomes: list[_Outcome[T]] = []

        def run() -> None:
            try:
                outcomes.append(_Outcome(work()))
            except BaseException as error:  # whatever it is, the others must not wait for ever
                outcomes.append(_Outcome(error=error))

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        while True:
            thread.join(self.heartbeat_seconds)
            if not thread.is_alive():
                return outcomes[0]
            self._broadcast(None)  # still at it

    def _follow(self) -> Any:
        while (outcome := self._broadcast(None)) is None:
            pass
        if outcome.error is not None:
            raise outcome.error
        return outcome.value

    def _broadcast(self, outcome: _Outcome[Any] | None) -> _Outcome[Any] | None:
        box: list[Any] = [outcome]
        dist.broadcast_object_list(box, src=0)
        return cast("_Outcome[Any] | None", box[0])


@dataclass
class FollowedSession:
    """What processes other than the first know of the client's session."""

    client_id: str
    carried: dict[str, Tensor] = field(default_factory=dict)

    def close(self) -> None:
        """Nothing is held open."""


class SharedParticipation:
    """One client's participation, for all its processes.

    Args:
        processes: of the client.
        inner: on rank 0 the client's own; None on the others.
        total_steps: of the inner one.
    """

    def __init__(self, processes: Processes, inner: Participation | None, total_steps: int) -> None:
        self.total_steps = total_steps
        self._processes = processes
        self._inner = inner

    def next(self) -> Assignment | None:
        """The next local training, the same for all."""
        return self._processes.first_alone(lambda: self._leader.next(), _without_session)

    def complete(self, assignment: Assignment, result: LocalResult) -> dict[str, float]:
        """Rank 0's result is sent; gradients are averaged, so that all have the same."""
        return self._processes.first_alone(lambda: self._leader.complete(assignment, result))

    def final_adapter(self) -> Tensor | None:
        """The global adapter after the end."""
        return self._processes.first_alone(lambda: self._leader.final_adapter())

    @property
    def settlements(self) -> list[Settlement]:
        """What became of the messages; empty on all ranks but the first."""
        return getattr(self._inner, "settlements", [])

    @property
    def session(self) -> ClientSession | FollowedSession:
        """The client's session on rank 0."""
        return getattr(self._inner, "session", FollowedSession(""))

    @property
    def _leader(self) -> Participation:
        if self._inner is None:
            raise FedFSTQError("Only rank 0 holds the participation.")
        return self._inner


def open_processes(trainer: Any) -> Processes:
    """The processes that a Trainer runs in.

    Raises:
        ConfigError: it trains in a way that hides the adapter or its gradients.
    """
    args = trainer.args
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1 and trainer.accelerator.num_processes == 1:
        raise ConfigError(
            f"A launcher started {launched} processes, but this one believes that it is alone: each would take part as "
            "the same client. Where they have no GPU, type TrainingArguments(use_cpu=True)."
        )
    sharding = {
        "FSDP": trainer.is_fsdp_enabled or args.fsdp,  # Accelerate passes over the argument on CPUs, without a word
        "DeepSpeed": trainer.is_deepspeed_enabled,
        "Tensor parallelism": trainer.get_tp_size() > 1,
    }
    for name, on in sharding.items():
        if on:
            raise ConfigError(
                f"{name} splits the adapter over processes: each would see a part of its gradients only. Start a whole "
                "copy of the model per GPU instead: `accelerate launch --multi_gpu script.py`. Where the base does not "
                "fit, load it in 4 bits: quantization_config=BitsAndBytesConfig(load_in_4bit=True)."
            )
    if args.n_gpu > 1:
        raise ConfigError(
            f"One process trains on {args.n_gpu} GPUs by nn.DataParallel, which hides the gradients of the embeddings. "
            "Use a process for each: `accelerate launch --multi_gpu script.py`, or set CUDA_VISIBLE_DEVICES=0."
        )
    return Processes(trainer.accelerator.process_index, trainer.accelerator.num_processes)


def join_together(
    processes: Processes, join: Callable[[], tuple[Participation, FederationSpec]]
) -> tuple[Any, FederationSpec]:
    """Join a federation as one client of several processes; `join` runs on rank 0 alone."""
    if processes.count == 1:
        return join()
    joined = processes.first_alone(join, lambda joined: (joined[0].total_steps, joined[1]))
    if processes.rank > 0:
        total_steps, spec = cast("tuple[int, FederationSpec]", joined)
        return SharedParticipation(processes, None, total_steps), spec
    participation, spec = joined
    return SharedParticipation(processes, participation, participation.total_steps), spec


def check_shared(participation: Participation, processes: Processes) -> None:
    """Refuse a participation of one process, such as a simulation's, in several.

    Raises:
        ConfigError: saying how to start it.
    """
    if processes.count > 1 and not isinstance(participation, SharedParticipation):
        raise ConfigError(
            f"A {type(participation).__name__} runs in one process, not {processes.count}. Start it without a launcher."
        )


def _without_session(assignment: Assignment | None) -> Assignment | None:
    if assignment is None:
        return None
    session: Any = FollowedSession(assignment.session.client_id, dict(assignment.session.carried))
    return dataclasses.replace(assignment, session=session)


def _portable(error: BaseException) -> BaseException:
    """The error, or its text where it does not survive pickling."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return FedFSTQError(f"{type(error).__name__}: {error}")
    return error
