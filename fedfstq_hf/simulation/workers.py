"""Clients of a simulated round, trained side by side in worker processes that share one copy of the base model.

A worker does what the simulator would do itself: it opens a client's session, trains, packs and stores the message.
Everything it leaves is in the client's state folder, so results do not depend on how many workers there are, and a
worker that dies costs no more than its client's training. Between two rounds the workers share the evaluation.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor

from fedfstq_hf.codec.budget import Budgets, open_budget, open_refinement_budget
from fedfstq_hf.errors import FedFSTQError
from fedfstq_hf.federation.client.participation import Assignment, LocalResult, local_seed, store_message
from fedfstq_hf.federation.client.session import Caps, ClientSession
from fedfstq_hf.federation.mailbox.folder import FolderMailbox
from fedfstq_hf.federation.mailbox.protocol import RECORD_FILE
from fedfstq_hf.federation.record import RoundRecord
from fedfstq_hf.federation.scaffold import read_variate
from fedfstq_hf.federation.spec import FederationSpec
from fedfstq_hf.running.evaluate import Evaluator
from fedfstq_hf.simulation.forkserver import start_method, warm_up

_LOOK_SECONDS = 2.0  # between two looks at whether the workers still live
_PATIENCE_SECONDS = 10.0  # for workers to end by themselves


def client_name(index: int) -> str:
    """The client id of client `index`."""
    return f"client-{index:04d}"


@dataclass(frozen=True)
class Job:
    """One method and seed.

    Attributes:
        folder: of the run.
        spec: as JSON.
        arguments: of its `TrainingArguments`.
        caps: of each client's messages.
    """

    folder: Path
    spec: bytes
    arguments: dict[str, Any]
    caps: tuple[Caps, ...]


@dataclass(frozen=True)
class Task:
    """One client's local training of one round."""

    job: Job
    round: int
    index: int
    adapter: Tensor
    adapter_sha256: str
    messages: int


@dataclass(frozen=True)
class Batch:
    """One batch of the evaluation of an adapter, (num_params,)."""

    number: int
    adapter: Tensor


def open_session(folder: Path, index: int, spec: FederationSpec, schema: Any, caps: Caps) -> ClientSession:
    """The session of client `index` of the run in `folder`, whose messages have at most `caps` bytes."""
    name = client_name(index)
    return ClientSession(name, spec, schema, folder=folder / "clients" / name, durable=False, caps=caps)


def open_budgets(spec: FederationSpec, schema: Any) -> Budgets:
    """Of all clients of a federation, whose adapter has that schema."""
    num_params = spec.trained_part(schema).schema.num_params
    return Budgets(
        open_budget(spec.method.uplink_budget, num_params),
        open_refinement_budget(spec.method.refinement_budget, num_params),
    )


class WorkerPool:
    """Worker processes for the methods of one seed. A context manager; leaving it ends them.

    Args:
        count: processes, each computing in one thread.
        model: base with adapter; its tensors move to shared memory. Each worker has its own copy of the adapter only.
        datasets: the clients' data.
        pad_id: padding token.
        evaluator: of the held-out examples.
    """

    def __init__(self, count: int, model: Any, datasets: Sequence[Any], pad_id: int, evaluator: Evaluator) -> None:
        warm_up()
        context: Any = mp.get_context(start_method())
        model.share_memory()
        self._evaluator = evaluator
        self._tasks, self._results = context.Queue(), context.Queue()
        arguments = (model, list(datasets), pad_id, evaluator, self._tasks, self._results)
        self._workers = [context.Process(target=_work, args=arguments, daemon=True) for _ in range(count)]
        for worker in self._workers:
            worker.start()

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def train(
        self, job: Job, round: int, indices: Sequence[int], adapter: Tensor, adapter_sha256: str, messages: int
    ) -> dict[int, float]:
        """Train clients `indices` from `adapter` and store their messages; returns seconds per client.

        Args:
            messages: that the round is expected to have, as `Assignment` says.

        Raises:
            FedFSTQError: a worker failed or died; what the others finished is stored.
        """
        for index in indices:
            self._tasks.put(Task(job, round, index, adapter, adapter_sha256, messages))
        seconds: dict[int, float] = {}
        while len(seconds) < len(indices):
            index, spent, error = self._receive()
            if error is not None:
                raise FedFSTQError(f"{client_name(index)} could not be trained in round {round}:\n{error}")
            seconds[index] = spent
        return seconds

    def evaluate(self, adapter: Tensor) -> dict[str, float]:
        """The metrics of an adapter, its batches shared out, the longest first.

        Sums are taken in the order of the batches, so the figures are the same with any number of workers.
        """
        counts: dict[int, Any] = {}
        for number in reversed(range(len(self._evaluator))):
            self._tasks.put(Batch(number, adapter))
        while len(counts) < len(self._evaluator):
            number, count, error = self._receive()
            if error is not None:
                raise FedFSTQError(f"The adapter could not be evaluated:\n{error}")
            counts[number] = count
        return self._evaluator.combine(counts[number] for number in sorted(counts))

    def _receive(self) -> Any:
        while True:
            try:
                return self._results.get(timeout=_LOOK_SECONDS)
            except queue.Empty:
                self._check_alive()

    def close(self) -> None:
        """End the workers."""
        for _ in self._workers:
            self._tasks.put(None)
        deadline = time.monotonic() + _PATIENCE_SECONDS
        for worker in self._workers:
            worker.join(max(0.0, deadline - time.monotonic()))
            if worker.is_alive():
                worker.terminate()
                worker.join()

    def _check_alive(self) -> None:
        dead = [worker for worker in self._workers if not worker.is_alive()]
        if dead:
            raise FedFSTQError(
                f"A worker process ended with exit code {dead[0].exitcode} (-9: killed, perhaps for want of memory). "
                "Go on with --resume, with fewer --workers."
            )


class _Inbox:
    """A worker's tasks: it answers for the batches of evaluations itself and gives out the trainings."""

    def __init__(self, model: Any, view: Any, evaluator: Evaluator, tasks: Any, results: Any) -> None:
        self._model, self._view, self._evaluator = model, view, evaluator
        self._tasks, self.results = tasks, results

    def training(self) -> Task | None:
        """The next training; blocks until there is one. None is the end."""
        while True:
            task: Task | Batch | None = self._tasks.get()
            if not isinstance(task, Batch):
                return task
            try:
                self._view.write(task.adapter)
                self.results.put((task.number, self._evaluator.count(self._model, task.number), None))
            except Exception:
                self.results.put((task.number, None, traceback.format_exc()))


class _WorkerParticipation:
    """What a worker's Trainer asks: tasks of one job, until one of another job, or the end, comes."""

    def __init__(self, first: Task, schema: Any, datasets: Sequence[Any], inbox: _Inbox) -> None:
        self.job = first.job
        self.spec = FederationSpec.from_json(first.job.spec)
        self.following: Task | None = first
        self.total_steps = self.spec.rounds * self.spec.local_steps * len(datasets)
        self._schema, self._datasets, self._inbox = schema, datasets, inbox
        self._budgets = open_budgets(self.spec, schema)
        self._index, self._started = first.index, 0.0

    def next(self) -> Assignment | None:
        task = self.following if self.following is not None else self._inbox.training()
        if task is None or task.job != self.job:
            self.following = task
            return None
        self.following = None
        self._index, self._started = task.index, time.perf_counter()
        session = open_session(self.job.folder, task.index, self.spec, self._schema, self.job.caps[task.index])
        return Assignment(
            round=task.round,
            session=session,
            adapter=task.adapter,
            adapter_sha256=task.adapter_sha256,
            seed=local_seed(self.spec.seed, session.client_id, task.round),
            dataset=self._datasets[task.index],
            variate=self._variate(task.round),
            messages=task.messages,
        )

    def _variate(self, round: int) -> Tensor | None:
        if not self.spec.method.scaffold:
            return None
        mailbox = FolderMailbox(self.job.folder / "mailbox", durable=False)
        record = RoundRecord.from_json(mailbox.read(round, RECORD_FILE))
        return read_variate(mailbox, record, self.spec, self._schema.num_params)

    def complete(self, assignment: Assignment, result: LocalResult) -> dict[str, float]:
        store_message(assignment.session, self._budgets, assignment, result)
        assignment.session.close()
        self._inbox.results.put((self._index, time.perf_counter() - self._started, None))
        return {}

    def final_adapter(self) -> Tensor | None:
        return None

    def report(self, error: str) -> None:
        """Tell the simulator that the client at hand failed."""
        self._inbox.results.put((self._index, 0.0, error))


def _work(model: Any, datasets: Sequence[Any], pad_id: int, evaluator: Evaluator, tasks: Any, results: Any) -> None:
    """A worker process: one Trainer per job."""
    import transformers

    from fedfstq_hf.adapter import AdapterView
    from fedfstq_hf.running.foundation import quiet_arguments
    from fedfstq_hf.trainer.trainer import FedFSTQTrainer
    from fedfstq_hf.workloads import Collator

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the simulator ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.clone()  # the adapter is a worker's own
    view = AdapterView(model)
    inbox = _Inbox(model, view, evaluator, tasks, results)
    task = inbox.training()
    while task is not None:
        participation = _WorkerParticipation(task, view.schema, datasets, inbox)
        try:
            trainer = FedFSTQTrainer(
                model=model,
                args=quiet_arguments(task.job.folder, **task.job.arguments),
                train_dataset=datasets[task.index],
                data_collator=Collator(pad_id),
            )
            trainer.remove_callback(transformers.PrinterCallback)
            trainer.take_part(participation, participation.spec)
        except Exception:
            participation.report(traceback.format_exc())
            return
        task = participation.following


def _end_with_parent() -> None:
    """A simulator that was killed leaves no workers behind: they would hold clients' sessions."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
