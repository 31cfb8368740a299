"""One local step as the Trainer takes it: its loss, what is read off its gradients, and what is added to them."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from fedfstq_hf.adapter import AdapterView
from fedfstq_hf.config import FedFSTQConfig
from fedfstq_hf.errors import ConfigError, NonFiniteError
from fedfstq_hf.federation.client import Assignment
from fedfstq_hf.federation.spec import FederationSpec
from fedfstq_hf.sensitivity import AdapterFisher
from fedfstq_hf.sensitivity.adapter import second_moments
from fedfstq_hf.trainer.gradient_hooks import StepObserver
from fedfstq_hf.trainer.methods.fedbat import Binarisation
from fedfstq_hf.trainer.methods.fedprox import Proximal
from fedfstq_hf.trainer.methods.fedtome import TokenMerging
from fedfstq_hf.trainer.methods.scaffold_client import Correction
from fedfstq_hf.trainer.processes import Processes
from fedfstq_hf.trainer.token_filter import FISHER_WEIGHTS, TOKEN_WEIGHTS, TokenFilter, count_targets, open_filter

logger = logging.getLogger(__name__)

_TrainerLike: Any = Trainer if TYPE_CHECKING else object


class LocalSteps(_TrainerLike):  # type: ignore[misc]
    """Base of `FedFSTQMixin`: what a local step does besides the Trainer's."""

    federation: FedFSTQConfig
    adapter_view: AdapterView
    _processes: Processes
    _assignment: Assignment | None
    _start_adapter: Tensor | None
    _local_step: int
    _losses: list[Tensor]

    _observer: StepObserver
    _filter: TokenFilter | None
    _proximal: Proximal | None
    _correction: Correction | None
    _binarisation: Binarisation | None
    _merging: TokenMerging | None
    _fisher_source: str
    _step_losses: list[Tensor]
    """Of the micro-batches of the step at hand, of all target tokens; NaN where only some were seen."""
    _all_tokens_loss: Tensor | None = None
    """Of the micro-batch at hand, where another one is optimised."""
    _skipped_steps = 0
    """Of local training; in a round it is the steps without losses."""

    @property
    def adapter_fisher(self) -> AdapterFisher:
        """Fisher information of the adapter's coordinates from their gradients, as of the last step."""
        return self._observer.fisher

    def fisher_vector(self) -> Tensor:
        """What messages are weighted by: (num_params,) float32, from the source that the settings name.

        Raises:
            ConfigError: `fisher="adam"` with an optimizer that keeps no second moments.
        """
        if self._fisher_source == "adam":
            return second_moments(self.optimizer, self.adapter_view.parameters)
        return self._observer.fisher.vector()

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The Trainer's own; in training steps of a token-filtered objective that of the weighted target tokens."""
        weights, for_fisher = inputs.pop(TOKEN_WEIGHTS, None), inputs.pop(FISHER_WEIGHTS, None)
        if weights is None or self._filter is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        steps = self.current_gradient_accumulation_steps
        loss, filtered, all_tokens, outputs = self._filter.losses(
            model, inputs, weights, for_fisher, num_items_in_batch, steps=steps
        )
        share = 1.0 if num_items_in_batch is not None else 1.0 / steps  # the Trainer divides such a loss by itself
        if filtered is not None:
            filtered = filtered * share
            self._observer.take_gradients(
                torch.autograd.grad(filtered, self.adapter_view.parameters, retain_graph=True, allow_unused=True)
            )
        if self.args.average_tokens_across_devices or num_items_in_batch is None:
            count = self.accelerator.num_processes // self.get_tp_size()
            loss, all_tokens = loss * count, all_tokens * count  # their mean is taken, as in Trainer
        self._all_tokens_loss = all_tokens * share
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """An ordinary step; then Fisher information from its gradients, before they are clipped.

        A step with NaN or infinite gradients is skipped: nothing is read off it, and the optimizer leaves parameters
        without gradient as they are, its own state included.
        """
        self._all_tokens_loss = None
        merging = contextlib.nullcontext() if self._merging is None else self._merging.merging(inputs)
        if self._binarisation is not None:
            self._binarisation.enter(self._local_step)
        divisor = self._loss_divisor(inputs, num_items_in_batch)
        with self._observer.watch(self._local_step, inputs, divisor), merging:
            loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        of_all = loss.detach() if self._all_tokens_loss is None else self._all_tokens_loss
        self._step_losses.append(of_all)  # of a micro-batch, already divided by the number of them
        if not self.accelerator.sync_gradients:
            return loss
        losses, self._step_losses = self._step_losses, []
        if self._binarisation is not None:
            self._binarisation.leave()
        if not self._observer.end_step(self._local_step):
            self._skipped_steps += 1
            logger.warning("Local step %d: gradients are NaN or infinite; it is skipped.", self._local_step + 1)
            for parameter in self.adapter_view.parameters:
                parameter.grad = None
            if self._binarisation is not None:
                self._binarisation.exponents.grad = None
            return loss
        if self._assignment is not None:
            self._losses += losses
        start = self._start_adapter if self._assignment is None else self._assignment.adapter
        if self._proximal is not None and start is not None:
            self._proximal.add(start)
        if self._correction is not None:
            self._correction.add()
        return loss

    def _loss_divisor(self, inputs: dict[str, Any], num_items: Tensor | int | None) -> Tensor | float:
        """What the sum of the loss over a micro-batch's target tokens is divided by on its way to the backward pass.

        Of a Trainer's loss that is the number of target tokens, of the window or of the micro-batch. A loss of somebody
        else's is taken to be normalised as the Trainer's documentation asks for.
        """
        steps = self.current_gradient_accumulation_steps
        filtered = self._filter is not None and TOKEN_WEIGHTS in inputs
        scaled = getattr(self, "loss_is_scaled_for_ga", None)  # what somebody's own `compute_loss` says of itself
        if scaled is None:
            scaled = num_items is not None or self.compute_loss_func is not None
        if filtered and num_items is None:
            return self._filter.window_targets / self._processes.count  # type: ignore[union-attr]
        if num_items is not None and (filtered or scaled):
            return num_items / (self._processes.count if self.args.average_tokens_across_devices else 1)
        return count_targets(inputs, shifted=self._loss_shifts_labels) * (1 if scaled else steps)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, which also learns the step sizes where the update is trained in binary form."""
        super().create_optimizer(*args, **kwargs)
        if self._binarisation is not None:
            learned = self._binarisation.exponents
            if not any(learned is one for group in self.optimizer.param_groups for one in group["params"]):
                self.optimizer.add_param_group({"params": [learned], "weight_decay": 0.0})
        return self.optimizer

    def _weigh(self, batches: list[Any]) -> list[Any]:
        """The micro-batches of an optimizer step, with the weights of their target tokens where they differ."""
        if self._filter is not None:
            seed = self.args.seed if self._assignment is None else self._assignment.seed
            window = self._processes.window(batches)
            self._filter.weigh(window, self._observer.tokens, step=self._local_step, seed=seed)
        return batches

    def _after_step(self) -> None:
        """Refuse early what could not be read at the round's end."""
        if self._local_step == 1 and self._fisher_source == "adam":
            second_moments(self.optimizer, self.adapter_view.parameters)

    def _check_some_step_counted(self, skipped: int, steps: int, where: str) -> None:
        """Raises NonFiniteError where all steps were skipped."""
        if steps and skipped == steps:
            raise NonFiniteError(
                f"The loss or the gradients of client {self._client_id()!r} were NaN or infinite in every step of "
                f"{where}; nothing of this round was sent. Lower the learning rate or check the data."
            )

    def _set_up(self, settings: FedFSTQConfig | FederationSpec, *, fit_probe: bool = False) -> None:
        """What local training reads off and optimises; a federation's spec wins over the client's own settings."""
        filtered_only = settings.fisher_objective == "filtered-only"
        if filtered_only and self.args.world_size > 1:
            raise ConfigError("fisher_objective='filtered-only' needs a single process. Use fisher_objective='same'.")
        scaffold = isinstance(settings, FederationSpec) and settings.scaffold_clients is not None
        self._fisher_source, self._step_losses = settings.fisher, []
        self._observer = StepObserver(
            self.model,
            self.adapter_view,
            rho=settings.rho,
            refresh_steps=settings.refresh_steps,
            processes=self._processes,
            own_gradients=filtered_only,
            keep_fisher=settings.fisher == "gradients",
            fit_probe=fit_probe,
            mean_gradient=scaffold,
        )
        self._filter = open_filter(
            self,
            settings.objective,
            settings.token_keep_ratio,
            settings.refresh_steps,
            fisher_only=filtered_only,
        )
        self._proximal = Proximal(self.adapter_view, settings.proximal_mu) if settings.proximal_mu else None
        self._correction = Correction(self.adapter_view) if scaffold else None
        self._set_up_switches(settings if isinstance(settings, FederationSpec) else None)

    def _set_up_switches(self, spec: FederationSpec | None) -> None:
        """What only a federation's spec can ask for."""
        self._binarisation = self._merging = None
        if spec is not None and spec.learned_binarisation:
            self._binarisation = Binarisation(
                self.adapter_view,
                warmup=spec.binarisation_warmup,
                rho=spec.binarisation_rho,
                local_steps=spec.local_steps,
            )
        if spec is not None and spec.token_merge_ratio:
            self._merging = TokenMerging(self.model, spec.token_merge_ratio, spec.token_merge_layer)
