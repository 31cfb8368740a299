"""A client's local steps: their loss, what is read off their gradients, and what methods change in them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedfstq_hf.adapter import AdapterView
from fedfstq_hf.config import FedFSTQConfig
from fedfstq_hf.errors import ConfigError, DataError, NonFiniteError
from fedfstq_hf.federation.client.participation import LocalResult
from fedfstq_hf.federation.spec import FederationSpec
from fedfstq_hf.methods import LocalSwitches
from fedfstq_hf.sensitivity.fisher import second_moments
from fedfstq_hf.trainer.gradient_hooks import GradientObserver
from fedfstq_hf.trainer.methods.active import active_methods
from fedfstq_hf.trainer.methods.hooks import MicroBatch, RoundStart
from fedfstq_hf.trainer.processes import Processes
from fedfstq_hf.trainer.rounds import dump_optimizer
from fedfstq_hf.trainer.token_filter import FISHER_WEIGHTS, TOKEN_WEIGHTS, count_targets, open_filter

logger = logging.getLogger(__name__)


class LocalSteps:
    """Takes a Trainer's steps on one model, and keeps what a round has to show for them.

    Args:
        trainer: a `transformers.Trainer`, for its arguments, accelerator and optimizer.
        view: of its model's adapter.
        settings: a federation's spec, which wins over the client's own settings.
        processes: that train together.
        fit_probe: fit a saliency probe, for a client that shares it.

    Attributes:
        observer: Fisher information of adapter and tokens, as of the last step.
        filter: computes the loss; None where the Trainer does.
        methods: that change local training.
        done: local steps since `begin`.
        skipped: those of them whose gradients were NaN or infinite.
    """

    def __init__(
        self,
        trainer: Any,
        view: AdapterView,
        settings: FedFSTQConfig | FederationSpec,
        processes: Processes,
        *,
        fit_probe: bool = False,
    ) -> None:
        switches: LocalSwitches = settings.method if isinstance(settings, FederationSpec) else settings
        filtered_only = switches.fisher_objective == "filtered-only"
        if filtered_only and processes.count > 1:
            raise ConfigError("fisher_objective='filtered-only' needs a single process. Use fisher_objective='same'.")
        self.view, self._trainer, self._processes = view, trainer, processes
        self._federated = isinstance(settings, FederationSpec)
        self._fisher = switches.fisher
        self.observer = GradientObserver(
            view,
            rho=settings.rho,
            refresh_steps=settings.refresh_steps,
            processes=processes,
            own_gradients=filtered_only,
            keep_fisher=switches.fisher == "gradients",
            fit_probe=fit_probe,
        )
        self.filter = open_filter(
            trainer, switches.objective, switches.token_keep_ratio, settings.refresh_steps, fisher_only=filtered_only
        )
        self.methods = active_methods(settings, view)
        self.done = self.skipped = 0
        self._seed: int = trainer.args.seed
        self._losses: list[Tensor] = []  # of the round's steps
        self._parts: list[Tensor] = []  # of the micro-batches of the step at hand, each divided by their number
        self._all_tokens: Tensor | None = None  # of the micro-batch at hand, where another loss is optimised

    def begin(self, start: RoundStart) -> None:
        """Start a round, or local training."""
        self.done = self.skipped = 0
        self._seed, self._losses, self._parts = start.seed, [], []
        self.observer.begin(start.carried)
        for method in self.methods:
            method.begin(start)

    def fisher_vector(self) -> Tensor:
        """What messages are weighted by: (num_params,) float32, from the source that the settings name.

        Raises:
            ConfigError: `fisher="adam"` with an optimizer that keeps no second moments.
        """
        if self._fisher == "adam":
            return second_moments(self._trainer.optimizer, self.view.parameters)
        return self.observer.fisher.vector()

    def weigh(self, batches: list[Any], num_items: Tensor | None) -> list[Any]:
        """The micro-batches of an optimizer step, with the weights of their target tokens where they differ.

        Raises:
            DataError: in a federation, and none of their tokens is a target.
        """
        if self._federated and num_items is not None and int(num_items.sum()) == 0:
            raise DataError(
                f"All labels of a batch of {len(batches)} micro-batches are masked (-100): there is nothing to learn "
                "from. Check that truncation keeps the answers, or raise max_length."
            )
        if self.filter is not None:
            window = self._processes.window(batches) if self._processes.count > 1 else batches
            self.filter.weigh(window, self.observer.tokens, step=self.done, seed=self._seed)
        return batches

    def filtered_loss(self, model: nn.Module, inputs: dict[str, Any], num_items: Any) -> tuple[Tensor, Any]:
        """The loss of a micro-batch's weighted target tokens, as the Trainer normalises it, and the model's outputs."""
        weights, for_fisher = inputs.pop(TOKEN_WEIGHTS), inputs.pop(FISHER_WEIGHTS, None)
        trainer = self._trainer
        steps = trainer.current_gradient_accumulation_steps
        loss, filtered, all_tokens, outputs = self.filter.losses(  # type: ignore[union-attr]
            model, inputs, weights, for_fisher, num_items, steps=steps
        )
        share = 1.0 if num_items is not None else 1.0 / steps  # the Trainer divides such a loss by itself
        if filtered is not None:
            filtered = filtered * share
            self.observer.take_gradients(
                torch.autograd.grad(filtered, self.view.parameters, retain_graph=True, allow_unused=True)
            )
        if trainer.args.average_tokens_across_devices or num_items is None:
            count = trainer.accelerator.num_processes // trainer.get_tp_size()
            loss, all_tokens = loss * count, all_tokens * count  # their mean is taken, as in Trainer
        self._all_tokens = all_tokens * share
        return loss, outputs

    def training_step(
        self, plain: Callable[..., Tensor], model: nn.Module, inputs: dict[str, Any], num_items: Any
    ) -> Tensor:
        """The Trainer's own `training_step`, `plain`; then Fisher information from its gradients, before clipping.

        A step with NaN or infinite gradients is skipped: nothing is read off it, and the optimizer leaves parameters
        without gradient as they are, its own state included.
        """
        batch = MicroBatch(inputs, self.done, last=self._trainer.accelerator.sync_gradients)
        self._all_tokens = None
        with contextlib.ExitStack() as hooks:
            hooks.enter_context(self.observer.watch(self.done, inputs, self._loss_divisor(inputs, num_items)))
            for method in self.methods:
                hooks.enter_context(method.forward(batch))
            loss = plain(model, inputs, num_items)
        self._parts.append(loss.detach() if self._all_tokens is None else self._all_tokens)
        if batch.last:
            self._end_backward()
        return loss

    def _end_backward(self) -> None:
        """All gradients of an optimizer step are there."""
        parts, self._parts = self._parts, []
        if not self.observer.end_step(self.done):
            self.skipped += 1
            logger.warning("Local step %d: gradients are NaN or infinite; it is skipped.", self.done + 1)
            for parameter in (*self.view.parameters, *self.learned()):
                parameter.grad = None
            return
        if self._federated:
            self._losses.append(torch.stack(parts).sum())
        for method in self.methods:
            method.backward()

    def end_step(self) -> None:
        """After an optimizer step: count it, and refuse early what could not be read at the round's end."""
        self.done += 1
        if self.done == 1 and self._fisher == "adam":
            self.fisher_vector()

    def check_some_counted(self, client_id: str, where: str) -> None:
        """Raises NonFiniteError where all steps were skipped."""
        if self.done and self.skipped == self.done:
            raise NonFiniteError(
                f"The loss or the gradients of client {client_id!r} were NaN or infinite in every step of {where}; "
                "nothing of this round was sent. Lower the learning rate or check the data."
            )

    def result(self, num_examples: int, *, keep_optimizer: bool) -> LocalResult:
        """What the round gives back."""
        carried = self.observer.carried()
        if keep_optimizer:
            carried |= dump_optimizer(self._trainer.optimizer, self.view.parameters)
        fields: dict[str, Tensor] = {}
        for method in self.methods:
            fields |= method.end(self.done)
        return LocalResult(
            adapter=self.view.read(),
            fisher=self.fisher_vector(),
            num_examples=num_examples,
            carried=carried,
            loss=self._mean_loss(),
            **fields,
        )

    def _mean_loss(self) -> float | None:
        """Over steps and processes. A step with a NaN loss does not count: not all of its tokens were seen."""
        if not self._losses:
            return None
        mine = float(torch.stack(self._losses).nanmean())
        return self._processes.mean(mine) if self._processes.count > 1 else mine

    def learned(self) -> list[nn.Parameter]:
        """What methods learn beside the adapter."""
        return [parameter for method in self.methods for parameter in method.parameters]

    def state_dict(self) -> dict[str, Tensor]:
        """Everything as it stands between two steps, on the CPU."""
        state = self.observer.state_dict()
        state["losses"] = torch.stack(self._losses).cpu() if self._losses else torch.zeros(0)
        state["steps"] = torch.tensor([self.done, self.skipped])
        for method in self.methods:
            state |= {f"{method.name}.{key}": value.cpu() for key, value in method.state_dict().items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict()` returned, after `begin`."""
        self.observer.load_state_dict(state)
        self._losses = list(state["losses"].to(self._trainer.args.device).unbind())
        self.done, self.skipped = (int(count) for count in state["steps"])
        for method in self.methods:
            prefix = f"{method.name}."
            method.load_state_dict({key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)})

    def _loss_divisor(self, inputs: Mapping[str, Any], num_items: Tensor | int | None) -> Tensor | float:
        """What the sum of the loss over a micro-batch's target tokens is divided by on its way to the backward pass.

        Of a Trainer's loss that is the number of target tokens, of the window or of the micro-batch. A loss of somebody
        else's is taken to be normalised as the Trainer's documentation asks for.
        """
        trainer = self._trainer
        filtered = self.filter is not None and TOKEN_WEIGHTS in inputs
        scaled = getattr(trainer, "loss_is_scaled_for_ga", None)  # what somebody's own `compute_loss` says of itself
        if scaled is None:
            scaled = num_items is not None or trainer.compute_loss_func is not None
        if filtered and num_items is None:
            return self.filter.window_targets / self._processes.count  # type: ignore[union-attr]
        if num_items is not None and (filtered or scaled):
            return num_items / (self._processes.count if trainer.args.average_tokens_across_devices else 1)
        steps = trainer.current_gradient_accumulation_steps
        return count_targets(inputs, shifted=trainer._loss_shifts_labels) * (1 if scaled else steps)
