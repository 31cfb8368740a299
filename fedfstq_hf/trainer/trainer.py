"""`FedFSTQTrainer`: a `transformers.Trainer` whose `train()` takes part in a federation.

Rounds are cut by steps inside one long `train()`. At a round's start the mixin sets adapter, schedule, optimizer state
and random numbers; during it, it reads Fisher information off the ordinary backward pass; at its end it hands the
adapter to the participation, which packs and sends the change.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, set_seed

from fedfstq_hf.adapter import AdapterView
from fedfstq_hf.config import FedFSTQConfig
from fedfstq_hf.errors import ConfigError, DataError, MailboxError
from fedfstq_hf.federation.client import Assignment, LocalResult, Participation
from fedfstq_hf.federation.scaffold import client_variate
from fedfstq_hf.federation.session import Settlement
from fedfstq_hf.federation.spec import FederationSpec
from fedfstq_hf.sensitivity import TokenSensitivity
from fedfstq_hf.sensitivity.table import SensitivityTable
from fedfstq_hf.trainer.arguments import announce, replaced, typed
from fedfstq_hf.trainer.checkpoint import find_state
from fedfstq_hf.trainer.joining import check_arguments, join
from fedfstq_hf.trainer.packing import pack_local
from fedfstq_hf.trainer.processes import check_shared, join_together, open_processes
from fedfstq_hf.trainer.resuming import ResumableRounds
from fedfstq_hf.trainer.rounds import RoundSampler, dump_optimizer, load_optimizer, set_schedule, skip_batches
from fedfstq_hf.trainer.steps import LocalSteps
from fedfstq_hf.trainer.uploading import AllowListedUploads

logger = logging.getLogger(__name__)

_TrainerLike: Any = Trainer if TYPE_CHECKING else object  # the mixin stands before any Trainer class, TRL's included


class FedFSTQMixin(ResumableRounds, LocalSteps, AllowListedUploads, _TrainerLike):  # type: ignore[misc]
    """Adds the federation to a Trainer class; put it before that class in the bases.

    Args:
        federation: this client's settings; `FedFSTQConfig()` trains locally and packs on request.
        *args, **kwargs: those of the Trainer.
    """

    def __init__(self, *args: Any, federation: FedFSTQConfig | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.federation = federation or FedFSTQConfig()
        self._spec: FederationSpec | None = None
        self._processes = open_processes(self)
        self.adapter_view = AdapterView(self.model)
        self._set_up(self.federation)
        self._participation: Participation | None = None
        self._assignment: Assignment | None = None
        self._batches: Iterator[Any] | None = None
        self._local_step = 0
        self._losses: list[Tensor] = []
        self._ended = False
        self._start_adapter: Tensor | None = None
        self._fed_metrics: dict[str, float] = {}
        self._staged = []
        self._trained_with: dict[str, Any] = {}
        self._check_uploads()
        self.settlements: list[Settlement] = []
        self.add_callback(_RoundEnd(self))

    # What a user calls

    @property
    def sensitivity(self) -> TokenSensitivity:
        """Sensitivity of the loss to each token id, as of the last refresh step."""
        return self._observer.tokens

    def token_sensitivity(self) -> SensitivityTable:
        """The same as a table, most sensitive tokens first; shows itself in a notebook.

        Raises:
            ConfigError: the trainer has no tokenizer to name the ids by.
        """
        if self.processing_class is None:
            raise ConfigError("token_sensitivity() names token ids: pass processing_class=tokenizer to the trainer.")
        return SensitivityTable.from_sensitivity(self.sensitivity, self.processing_class)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Take part in every round until the federation ends; without a mailbox, train locally.

        Args:
            resume_from_checkpoint: as in `Trainer`. In a federation a checkpoint of this client from within the round
                that is still open goes on in the middle of it, bit for bit; from any other, and without one, the newest
                round starts from its beginning, as the client's state folder and the mailbox hold all it needs.
            **kwargs: passed on to `Trainer.train`.

        Raises:
            AdapterMismatchError: another base model or LoRA configuration than the federation's.
            MailboxError: no federation at the address, or nobody serves it.
            NonFiniteError: in every step of a round the gradients were NaN or infinite; nothing of it was sent.
                Where only some are, those steps are skipped and counted in the log as `fed_skipped_steps`.
        """
        if self.federation.mailbox is None:
            if not resume_from_checkpoint or self._start_adapter is None:
                self._start_adapter = self.adapter_view.read()
            self._observer.fisher.reset()
            self._local_step, self._skipped_steps, self._trained_with = 0, 0, {}
            output = super().train(resume_from_checkpoint, **kwargs)
            self._check_some_step_counted(self._skipped_steps, self._local_step, "local training")
            return output
        self._check_dataset(self.train_dataset)
        participation, spec = join_together(
            self._processes,
            lambda: join(
                self.federation,
                self.model,
                self.adapter_view,
                tokenizer=self.processing_class,
                output_dir=self.args.output_dir,
            ),
        )
        self.settlements = participation.settlements
        try:
            return self.take_part(participation, spec, resume_from_checkpoint, **kwargs)
        finally:
            participation.session.close()

    def take_part(
        self,
        participation: Participation,
        spec: FederationSpec,
        resume_from_checkpoint: str | bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Train whatever `participation` hands out until it ends, and load the final adapter.

        Args:
            participation: a mailbox's, or a simulation's.
            spec: what the federation shares; its training arguments are this trainer's until it ends.
            resume_from_checkpoint: see `train`.
            **kwargs: passed on to `Trainer.train`.
        """
        check_shared(participation, self._processes)
        check_arguments(self.args)
        shared = typed(self.args, spec.training)
        if self._processes.rank == 0:
            announce(self.args, shared)
        self._participation, self._spec, self._ended = participation, spec, False
        self._trained_with = {**shared, "max_steps": max(participation.total_steps, 1)}
        self.adapter_view.freeze_a(spec.freeze_a)
        self._set_up(spec, fit_probe=spec.share_saliency and self.federation.share_saliency)
        try:
            with replaced(self.args, **self._trained_with):
                output_dir = self.args.output_dir
                saved = self._processes.first_alone(
                    lambda: find_state(resume_from_checkpoint, output_dir, self._states())
                )
                output = super().train(self._choose_checkpoint(saved), **kwargs)
                reached_end = self.state.global_step >= self.args.max_steps  # a user's callback may have stopped it
                if reached_end and not self._ended and self._next_round():
                    raise MailboxError("The federation handed out a round after its last step.")
        finally:
            self._participation, self._spec, self._assignment, self._batches = None, None, None, None
            self._upcoming, self._resumed = (), None
        return output

    def pack_update(self) -> bytes:
        """The message that carries what local training changed, from where `train()` started.

        Returns:
            A packed message of round 0, within `uplink_budget`.
        """
        if self._start_adapter is None:
            raise ConfigError("There is nothing to pack yet: call train() first.")
        return pack_local(
            self.federation,
            self.adapter_view,
            self._start_adapter,
            self.fisher_vector(),
            self._num_examples(),
        )

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The Trainer's card; after a federation it names the arguments that the federation set."""
        with replaced(self.args, **self._trained_with):
            super().create_model_card(*args, **kwargs)

    def _check_dataset(self, dataset: Any) -> None:
        if dataset is None or not hasattr(dataset, "__len__"):
            raise DataError(
                "A federated client needs a train_dataset of known length; materialise a streaming one first."
            )
        if len(dataset) == 0:
            raise DataError(f"The training data of client {self._client_id()!r} is empty: it cannot take part.")

    # Rounds inside one train()

    def get_train_dataloader(self) -> DataLoader[Any]:
        """In a federation a placeholder of the right length: each round brings its own loader."""
        if self._participation is None:
            loader: DataLoader[Any] = super().get_train_dataloader()
            return loader
        return DataLoader(range(self.args.max_steps * self.args.gradient_accumulation_steps))  # type: ignore[arg-type]

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """The micro-batches of the next optimizer step, from the round at hand; begins a round where none is."""
        batches: list[Any]
        if self._participation is None:
            batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
            return self._weigh(batches), num_items
        if self._assignment is None and not self._next_round():
            self.control.should_training_stop = True
            return [], None
        batches, num_items = super().get_batch_samples(self._batches, num_batches, device)
        if num_items is not None and int(num_items.sum()) == 0:
            raise DataError(
                f"All labels of a batch of {len(batches)} micro-batches are masked (-100): there is nothing to learn "
                "from. Check that truncation keeps the answers, or raise max_length."
            )
        return self._weigh(batches), num_items

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self._assignment is None or self._spec is None:
            return super()._get_train_sampler(train_dataset)
        args = self.args
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        dataset = self.train_dataset if train_dataset is None else train_dataset
        return RoundSampler(len(dataset), self._spec.local_steps * batch, self._assignment.seed)

    def _next_round(self) -> bool:
        participation, spec, view = self._participation, self._spec, self.adapter_view
        if participation is None or spec is None:
            return False
        assignment = self._next_assignment(participation)
        if assignment is None:
            final = participation.final_adapter()
            if final is not None:
                view.write(final)
            self._ended = True
            return False
        if assignment.dataset is not None:
            self.train_dataset = assignment.dataset
        self._check_dataset(self.train_dataset)
        self._assignment, self._local_step = assignment, 0
        carried = assignment.session.carried
        self._observer.begin(carried)
        if self._correction is not None:
            self._correction.begin(assignment.variate, client_variate(carried, view.schema.num_params))
        if self._binarisation is not None:
            self._binarisation.begin(assignment.adapter, assignment.seed)
        if not self._continue_round(assignment):
            view.write(assignment.adapter)
            load_optimizer(self.optimizer, view.parameters, carried if spec.optimizer_state == "kept" else {})
            set_schedule(self.lr_scheduler, assignment.round * spec.local_steps)
        if assignment.global_step is not None:
            self._skip_steps(assignment.global_step + self._local_step - self.state.global_step)
        set_seed((assignment.seed + self._processes.rank) % 2**32)
        loader = super().get_train_dataloader()
        self._batches = iter(skip_batches(loader, self._local_step * self.args.gradient_accumulation_steps))
        return True

    def _skip_steps(self, count: int) -> None:
        """Count steps that this client did not take, but not into its mean losses."""
        self.state.global_step += count
        self._globalstep_last_logged += count
        self._initial_global_step += count

    def _end_step(self) -> None:
        """After an optimizer step: close the round when its local steps are done."""
        self._local_step += 1
        self._after_step()
        assignment, spec, participation = self._assignment, self._spec, self._participation
        if assignment is None or spec is None or participation is None or self._local_step < spec.local_steps:
            return
        counted = len(self._losses) // self.args.gradient_accumulation_steps
        skipped = spec.local_steps - counted
        self._check_some_step_counted(skipped, spec.local_steps, f"round {assignment.round}")
        if self._batches is not None:
            next(self._batches, None)  # lets Accelerate close the exhausted loader
        carried = self._observer.carried()
        if spec.optimizer_state == "kept":
            carried |= dump_optimizer(self.optimizer, self.adapter_view.parameters)
        result = LocalResult(
            adapter=self.adapter_view.read(),
            fisher=self.fisher_vector(),
            num_examples=self._num_examples(),
            carried=carried,
            loss=self._processes.mean(self._losses, counted),
            delta=None if self._binarisation is None else self._binarisation.update(spec.local_steps),
            variate=None if self._observer.mean is None else self._observer.mean.vector(),
        )
        metrics = participation.complete(assignment, result)
        self._fed_metrics = {**metrics, "fed_skipped_steps": skipped} if metrics else {}
        self._assignment, self._batches = None, None
        if self._fed_metrics and self.args.logging_strategy != "no":
            self.control.should_log = True  # a row for every round, however rarely the losses are logged

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """A schedule over the whole federation, also for a client that skips rounds."""
        if self._spec is not None and self._participation is not None:
            num_training_steps = self._spec.rounds * self._spec.local_steps
        return super().create_scheduler(num_training_steps, optimizer)

    def _num_examples(self) -> int:
        return len(self.train_dataset)

    def _client_id(self) -> str:
        return self.federation.client_id if self._assignment is None else self._assignment.session.client_id

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the federation's figures, so that they reach `log_history` and every reporter."""
        local = {"fed_skipped_steps": self._skipped_steps} if self._skipped_steps and self._spec is None else {}
        super().log({**logs, **local, **self._fed_metrics}, start_time)


class _RoundEnd(TrainerCallback):  # type: ignore[misc]
    def __init__(self, trainer: FedFSTQMixin) -> None:
        self._trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer._end_step()


class FedFSTQTrainer(FedFSTQMixin, Trainer):  # type: ignore[misc]
    """`transformers.Trainer` with one argument more, `federation`."""
