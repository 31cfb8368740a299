"""The Trainer's checkpoint hooks: what is saved of a round beside a checkpoint, and what resuming does with it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import Trainer

from fedfstq_hf.config import FedFSTQConfig
from fedfstq_hf.federation.client import Assignment, Participation
from fedfstq_hf.federation.spec import FederationSpec
from fedfstq_hf.trainer.checkpoint import CheckpointStates, Place, Saved
from fedfstq_hf.trainer.gradient_hooks import StepObserver
from fedfstq_hf.trainer.methods.fedbat import Binarisation
from fedfstq_hf.trainer.private_state import state_folder
from fedfstq_hf.trainer.processes import Processes

logger = logging.getLogger(__name__)

_TrainerLike: Any = Trainer if TYPE_CHECKING else object


class ResumableRounds(_TrainerLike):  # type: ignore[misc]
    """Base of `FedFSTQMixin`: checkpoints know how far a round has come."""

    federation: FedFSTQConfig
    _processes: Processes
    _participation: Participation | None
    _spec: FederationSpec | None
    _assignment: Assignment | None
    _observer: StepObserver
    _binarisation: Binarisation | None
    _local_step: int
    _losses: list[Tensor]
    _fed_metrics: dict[str, float]
    _start_adapter: Tensor | None

    _upcoming: tuple[Assignment | None, ...] = ()
    """The first assignment, where it was asked for before training began."""
    _resumed: Saved | None = None
    _resumes_within = False

    def _choose_checkpoint(self, saved: Saved | None) -> str | None:
        """The folder that the Trainer resumes from; None where a checkpoint's past is not this federation's."""
        if saved is None or self._participation is None or self._spec is None:
            return None
        self._upcoming = (self._participation.next(),)
        if not saved.leads_to(self._upcoming[0], self._spec):
            logger.info("%s is of another federation or of a later round: the round at hand starts anew.", saved.folder)
            return None
        self._resumed = saved
        return saved.folder

    def _next_assignment(self, participation: Participation) -> Assignment | None:
        if not self._upcoming:
            return participation.next()
        (assignment,), self._upcoming = self._upcoming, ()
        return assignment

    def _continue_round(self, assignment: Assignment) -> bool:
        """Whether a checkpoint was taken within this very round; then the round goes on from there.

        The Trainer itself loaded adapter, optimizer and schedule.
        """
        resumed, self._resumed, self._losses = self._resumed, None, []
        self._resumes_within = resumed is not None and resumed.within(assignment)
        if resumed is not None:
            self._fed_metrics = dict(resumed.place.metrics)
            if self._resumes_within:
                self._local_step = resumed.place.local_step
                self._losses = resumed.restore(self._observer, self.args.device, self._binarisation)
        return self._resumes_within

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if not self.args.should_save or self.args.save_only_model:
            return
        assignment, spec = self._assignment, self._spec
        place = Place(
            client_id=self._client_id(),
            global_step=self.state.global_step,
            local_step=self._local_step,
            federation=None if spec is None else spec.id,
            round=None if assignment is None else assignment.round,
            adapter_sha256=None if assignment is None else assignment.adapter_sha256,
            metrics=self._fed_metrics,
        )
        folder = f"{self._get_output_dir(trial)}/checkpoint-{self.state.global_step}"
        start = self._start_adapter if spec is None else None
        self._states().save(
            folder, place, self._observer, losses=self._losses, start=start, binarisation=self._binarisation
        )

    def _states(self) -> CheckpointStates:
        """The state files of this trainer's checkpoints, outside of what is uploaded."""
        output_dir = self.args.output_dir
        return CheckpointStates(state_folder(self.federation.state_dir, output_dir), output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self._participation is not None:
            return
        saved = self._processes.first_alone(lambda: self._states().find(resume_from_checkpoint))
        if saved is not None and saved.place.federation is None:
            saved.restore(self._observer)
            self._local_step, self._start_adapter = saved.place.local_step, saved.start

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """A round that starts from its beginning draws from its own seed, whatever a checkpoint holds."""
        if self._participation is None or self._resumes_within:
            super()._load_rng_state(checkpoint)
