"""`FedFSTQTrainer`: a `transformers.Trainer` whose `train()` takes part in a federation.

Rounds are cut by steps inside one long `train()`. At a round's start the trainer sets adapter, schedule, optimizer
state and random numbers; during it, `LocalSteps` reads Fisher information off the ordinary backward pass; at its end
the participation gets the adapter, and packs and sends the change.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import Trainer, set_seed
from transformers.trainer_utils import has_length

from fedfstq_hf.adapter import AdapterView
from fedfstq_hf.config import FedFSTQConfig
from fedfstq_hf.errors import ConfigError, MailboxError
from fedfstq_hf.federation.client.participation import Participation
from fedfstq_hf.federation.client.session import Settlement
from fedfstq_hf.federation.spec import FederationSpec
from fedfstq_hf.sensitivity import AdapterFisher, TokenSensitivity
from fedfstq_hf.sensitivity.table import SensitivityTable
from fedfstq_hf.trainer.arguments import announce, check_arguments, replaced, signature_with_federation, typed
from fedfstq_hf.trainer.checkpoint import START, CheckpointStates, Place, state_folder
from fedfstq_hf.trainer.joining import join, local_budget, pack_local
from fedfstq_hf.trainer.methods.hooks import RoundStart
from fedfstq_hf.trainer.processes import check_shared, join_together, open_processes
from fedfstq_hf.trainer.rounds import OptimizerState, Rounds, check_dataset, placeholder, set_schedule, settle
from fedfstq_hf.trainer.steps import AfterStep, LocalSteps
from fedfstq_hf.trainer.token_filter import TOKEN_WEIGHTS
from fedfstq_hf.trainer.uploading import Uploads

_TrainerLike: Any = Trainer if TYPE_CHECKING else object  # the mixin stands before any Trainer class, TRL's included


class FedFSTQMixin(_TrainerLike):  # type: ignore[misc]
    """Adds the federation to a Trainer class; put it before that class in the bases.

    Args:
        federation: this client's settings; `FedFSTQConfig()` trains locally and packs on request.
        *args, **kwargs: those of the Trainer.
    """

    _rounds: Rounds | None = None
    """Of the federation, while the trainer takes part in one."""

    def __init__(self, *args: Any, federation: FedFSTQConfig | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.federation = federation or FedFSTQConfig()
        self.settlements: list[Settlement] = []
        self._processes = open_processes(self)
        self._view = AdapterView(self.model)
        self._open_steps(self.federation)
        self._start_adapter: Tensor | None = None  # of local training
        self._optimizer: OptimizerState | None = None
        self._fed_metrics: dict[str, float] = {}
        self._trained_with: dict[str, Any] = {}
        self._uploads = Uploads(self, self.federation.state_dir)
        self.add_callback(AfterStep(lambda: self._end_step()))

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.__signature__ = signature_with_federation(cls, FedFSTQMixin)

    # What a user calls

    @property
    def adapter_view(self) -> AdapterView:
        """The adapter of the model at hand: with `model_init`, `train()` begins with a new one."""
        if self._view.model is not self.model:
            self._view = AdapterView(self.model)
        return self._view

    @property
    def sensitivity(self) -> TokenSensitivity:
        """Sensitivity of the loss to each token id, as of the last refresh step."""
        return self._held_steps.observer.tokens

    @property
    def adapter_fisher(self) -> AdapterFisher:
        """Fisher information of the adapter's coordinates from their gradients, as of the last step."""
        return self._held_steps.observer.fisher

    def fisher_vector(self) -> Tensor:
        """What messages are weighted by: (num_params,) float32, from the source that the settings name.

        Raises:
            ConfigError: `fisher="adam"` with an optimizer that keeps no second moments.
        """
        return self._steps.fisher_vector()

    def token_sensitivity(self) -> SensitivityTable:
        """`sensitivity` as a table, most sensitive first; `ConfigError` without a tokenizer to name the ids by."""
        if self.processing_class is not None:
            return SensitivityTable.from_sensitivity(self.sensitivity, self.processing_class)
        raise ConfigError("token_sensitivity() names token ids: pass processing_class=tokenizer to the trainer.")

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
            NonFiniteError, DataError: in every step of a round gradients were NaN or infinite, or labels masked:
                nothing of it was sent. Where only some are, those steps are skipped, see `fed_skipped_steps`.
        """
        if self.federation.mailbox is None:
            local_budget(self.federation, self.adapter_view)  # better refused now than after training
            self._begin_locally(keep_start=bool(resume_from_checkpoint))
            self._trained_with = {}
            output = super().train(resume_from_checkpoint, **kwargs)
            self._steps.check_some_counted(self._client_id(), "local training")
            return output
        check_dataset(self.train_dataset, self._client_id())
        asked = self.federation, self.adapter_view, self.processing_class, self.args.output_dir
        participation, spec = join_together(self._processes, lambda: join(*asked))
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
            resume_from_checkpoint, **kwargs: see `train`.
        """
        check_shared(participation, self._processes)
        check_arguments(self.args)
        shared = typed(self.args, spec.training_arguments)
        if self._processes.rank == 0:
            announce(self.args, shared)
        self._trained_with = {**shared, "max_steps": max(participation.total_steps, 1)}
        self._open_steps(spec, fit_probe=spec.share_saliency and self.federation.share_saliency)
        self._rounds = rounds = Rounds(participation, spec)
        try:
            with replaced(self.args, **self._trained_with):
                saved = self._processes.first_alone(lambda: self._states().asked_for(resume_from_checkpoint))
                if (checkpoint := rounds.choose(saved)) is not None and saved is not None:
                    self._fed_metrics = dict(saved.place.metrics)
                output = super().train(checkpoint, **kwargs)
                reached_end = self.state.global_step >= self.args.max_steps
                rounds.check_end(self._steps.done, asked=self.control.should_training_stop and not reached_end)
                if reached_end and not rounds.ended and self._next_round(rounds):
                    raise MailboxError("The federation was extended, and goes on: start this client again.")
        finally:
            self._rounds = None
        return output

    def pack_update(self) -> bytes:
        """A message of round 0, within `uplink_budget`: what local training changed from where `train()` started."""
        if self._start_adapter is None:
            raise ConfigError("There is nothing to pack yet: call train() first.")
        settle(self.optimizer)
        start, fisher = self._start_adapter, self.fisher_vector()
        return pack_local(self.federation, self.adapter_view, start, fisher, self._num_examples())

    # One local step

    @property
    def _steps(self) -> LocalSteps:
        """Of the model at hand."""
        if self._held_steps.view is not self.adapter_view:
            self._open_steps(*self._opened_with)
            if self._rounds is None and self.is_in_train:
                self._begin_locally(keep_start=False)
        return self._held_steps

    def _open_steps(self, settings: FedFSTQConfig | FederationSpec, fit_probe: bool = False) -> None:
        """What local training optimises and reads off; a federation's spec wins over the client's own settings."""
        self._opened_with = settings, fit_probe
        if isinstance(settings, FederationSpec):
            self.adapter_view.freeze_a(settings.method.freeze_a)
        self._held_steps = LocalSteps(self, self.adapter_view, settings, self._processes, fit_probe=fit_probe)

    def _begin_locally(self, *, keep_start: bool) -> None:
        if not keep_start or self._start_adapter is None:
            self._start_adapter = self.adapter_view.read()
        self._steps.begin(RoundStart(self._start_adapter, self.args.seed))

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The Trainer's own; in training steps of a token-filtered objective that of the weighted target tokens."""
        if TOKEN_WEIGHTS not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = self._steps.filtered_loss(super().compute_loss, model, inputs, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """The Trainer's own; then Fisher information from its gradients. One with NaN or infinite ones is skipped."""
        return self._steps.training_step(super().training_step, model, inputs, num_items_in_batch)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, which also moves what methods learn beside the adapter."""
        super().create_optimizer(*args, **kwargs)
        held = {id(one) for group in self.optimizer.param_groups for one in group["params"]}
        for learned in (one for one in self._steps.learned() if id(one) not in held):
            self.optimizer.add_param_group({"params": [learned], "weight_decay": 0.0})
        if self._optimizer is None or self._optimizer.optimizer is not self.optimizer:
            self._optimizer = OptimizerState(self.optimizer)
        return self.optimizer

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """The micro-batches of the next optimizer step, from the round at hand; begins a round where none is."""
        rounds = self._rounds
        if rounds is not None:
            if rounds.assignment is None and not self._next_round(rounds):
                self.control.should_training_stop = True
                return [], None
            epoch_iterator = rounds.data
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if rounds is not None and len(batches) < num_batches:
            rounds.check_end(self._steps.done, asked=False)
        return self._steps.weigh(batches, num_items), num_items

    # Rounds inside one train()

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        """In a federation a round is the loop's epoch: it gets a placeholder of that length, and batches by rounds."""
        rounds = self._rounds
        if rounds is None:
            return super()._inner_training_loop(*args, **kwargs)
        rounds.restart()
        if self.args.eval_on_start and (first := rounds.peek()) is not None:
            self.adapter_view.write(first.adapter)
        own: Any = self
        rounds.data.make_loader = own.get_train_dataloader
        own.get_train_dataloader = lambda: placeholder(rounds.spec.local_steps * self.args.gradient_accumulation_steps)
        try:
            return super()._inner_training_loop(*args, **kwargs)
        finally:
            del own.get_train_dataloader

    def _next_round(self, rounds: Rounds) -> bool:
        """Begin the next round; without one, load the final adapter."""
        assignment, spec = rounds.next(), rounds.spec
        resumed = rounds.resumed()
        if assignment is None:
            if (final := rounds.participation.final_adapter()) is not None:
                self.adapter_view.write(final)
            return False
        if assignment.dataset is not None:
            self.train_dataset = assignment.dataset
        check_dataset(self.train_dataset, self._client_id())
        steps, state, carried = self._steps, self.state, assignment.session.carried
        steps.begin(RoundStart(assignment.adapter, assignment.seed, carried, assignment.variate))
        steps.optimizer = optimizer = cast(OptimizerState, self._optimizer)
        if resumed is not None and rounds.resumes_within:  # the Trainer itself loaded adapter, optimizer and schedule
            steps.load_state_dict(resumed.tensors)
        else:
            self.adapter_view.write(assignment.adapter)
            kept = carried if spec.optimizer_state == "kept" else {}
            optimizer.load(self.adapter_view.parameters, kept)
            set_schedule(self.lr_scheduler, assignment.round * spec.local_steps)
        if assignment.global_step is not None:  # steps that others took count, but not into this client's mean losses
            missed = assignment.global_step + steps.done - state.global_step
            state.global_step += missed
            self._globalstep_last_logged += missed
            self._initial_global_step += missed
        set_seed((assignment.seed + self._processes.rank) % 2**32)
        done = steps.done * self.args.gradient_accumulation_steps
        rounds.data.begin(self, assignment.seed, done)
        return True

    def _end_step(self) -> None:
        """After an optimizer step: close the round when its local steps are done."""
        steps, rounds = self._steps, self._rounds
        steps.end_step()
        if rounds is None or rounds.assignment is None or steps.done < rounds.spec.local_steps:
            return
        steps.check_some_counted(self._client_id(), f"round {rounds.assignment.round}")
        rounds.data.end()
        settle(self.optimizer)
        result = steps.result(self._num_examples())
        metrics = rounds.participation.complete(rounds.assignment, result)
        self._fed_metrics = {**metrics, "fed_skipped_steps": steps.skipped} if metrics else {}
        rounds.assignment = None
        if self._fed_metrics and self.args.logging_strategy != "no":
            self.control.should_log = True  # a row for every round, however rarely the losses are logged

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        rounds = self._rounds
        if rounds is None or rounds.assignment is None or self.args.train_sampling_strategy != "random":
            return super()._get_train_sampler(train_dataset)
        dataset = self.train_dataset if train_dataset is None else train_dataset
        return rounds.data.order(self, dataset, rounds.assignment.seed)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """A schedule over the whole federation, also for a client that skips rounds."""
        if self._rounds is not None:
            num_training_steps = self._rounds.spec.rounds * self._rounds.spec.local_steps
        return super().create_scheduler(num_training_steps, optimizer)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's; `bf16_full_eval` and `fp16_full_eval` leave the adapter as it was."""
        with self.adapter_view.kept():
            return super().evaluation_loop(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the federation's figures, so that they reach `log_history` and every reporter."""
        skipped = self._held_steps.skipped if self._rounds is None else 0
        own = {**({"fed_skipped_steps": skipped} if skipped else {}), **self._fed_metrics}
        shown = {**logs, **own}
        super().log(shown, start_time)
        logs.update({name: value for name, value in shown.items() if name not in own})  # the Trainer's own additions

    def _num_examples(self) -> int:
        seen = len(self.train_dataset) if has_length(self.train_dataset) else self._steps.rows * self._processes.count
        return self.federation.num_examples or seen

    def _client_id(self) -> str:
        assignment = None if self._rounds is None else self._rounds.assignment
        return self.federation.client_id if assignment is None else assignment.session.client_id

    # Checkpoints

    def _states(self) -> CheckpointStates:
        """The state files of this trainer's checkpoints, outside of what is uploaded."""
        output_dir = self.args.output_dir
        return CheckpointStates(state_folder(self.federation.state_dir, output_dir), output_dir)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if not self.args.should_save or self.args.save_only_model:
            return
        tensors = self._steps.state_dict()
        if self._rounds is None and self._start_adapter is not None:
            tensors[START] = self._start_adapter
        place = Place(self._client_id(), self.state.global_step, self._steps.done, metrics=self._fed_metrics)
        if self._rounds is not None:
            place = dataclasses.replace(place, **self._rounds.place())
        self._states().save(f"{self._get_output_dir(trial)}/checkpoint-{self.state.global_step}", place, tensors)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self._rounds is not None:
            return
        saved = self._processes.first_alone(lambda: self._states().find(resume_from_checkpoint))
        if saved is not None and saved.place.federation is None:
            self._start_adapter = saved.start
            self._begin_locally(keep_start=True)
            self._steps.load_state_dict(saved.tensors)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """A round that starts from its beginning draws from its own seed, whatever a checkpoint holds."""
        if self._rounds is None or self._rounds.resumes_within:
            super()._load_rng_state(checkpoint)

    # What leaves this machine

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Save adapter, tokenizer and card, and upload them and nothing else: `Uploads.push` explains the arguments."""
        return self._uploads.push(commit_message, blocking, token, revision, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The Trainer's card; after a federation it names the arguments that the federation set."""
        with replaced(self.args, **self._trained_with):
            super().create_model_card(*args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self._uploads.push_checkpoint(checkpoint_folder)

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        self._uploads.clear()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """`training_args.bin` lies beside the model, and trackers may upload it: without `hub_token`."""
        with replaced(self.args, hub_token=None):
            super()._save(output_dir, state_dict)


class FedFSTQTrainer(FedFSTQMixin, Trainer):  # type: ignore[misc]
    """`transformers.Trainer` with one argument more, `federation`."""
