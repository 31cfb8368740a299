"""A client's local steps: their loss, what is read off their gradients, and what methods change in them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

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
from fedfstq_hf.trainer.rounds import OptimizerState
from fedfstq_hf.trainer.token_filter import (
    FISHER_WEIGHTS,
    TOKEN_WEIGHTS,
    TokenFilter,
    count_rows,
    count_targets,
    open_filter,
)

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
        skipped: those of them whose gradients were NaN or infinite, or whose labels were all masked.
        masked: those of them whose labels were all masked.
        rows: that were trained on since `begin`, by this process.
        optimizer: the optimizer's state; None before it was made.
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
        self._keeps_optimizer = isinstance(settings, FederationSpec) and settings.optimizer_state == "kept"
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
        self.done = self.skipped = self.masked = self.rows = 0
        self.optimizer: OptimizerState | None = None
        self._nothing_counts = False  # in the step at hand: all its labels are masked
        self._shown_equal = False  # the filter's loss, to the model's own
        self._seed: int = trainer.args.seed
        self._losses: list[Tensor] = []  # of the round's steps
        self._parts: list[Tensor] = []  # of the micro-batches of the step at hand, each divided by their number
        self._all_tokens: Tensor | None = None  # of the micro-batch at hand, where another loss is optimised

    def begin(self, start: RoundStart) -> None:
        """Start a round, or local training."""
        self.done = self.skipped = self.masked = self.rows = 0
        self._nothing_counts = False
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
        """The micro-batches of an optimizer step, with the weights of their target tokens where they differ."""
        self.rows += sum(count_rows(batch) for batch in batches)
        together = self._processes.count == 1 or self._trainer.args.average_tokens_across_devices  # all skip, or none
        self._nothing_counts = num_items is not None and together and int(num_items.sum()) == 0
        if self.filter is not None and not self._nothing_counts:
            window = self._processes.window(batches) if self._processes.count > 1 else batches
            self.filter.weigh(window, self.observer.tokens, step=self.done, seed=self._seed)
        return batches

    def filtered_loss(
        self, plain: Callable[..., Any], model: nn.Module, inputs: dict[str, Any], num_items: Any
    ) -> tuple[Tensor, Any]:
        """The loss of a micro-batch's weighted target tokens, as the Trainer normalises it, and the model's outputs.

        The first one is also computed by `plain`, the Trainer's own `compute_loss`. Where that is another loss (terms
        that an adapter or a router adds, labels that are not shifted), the Trainer's is the one that is optimised.

        Raises:
            ConfigError: they differ, and the objective weights tokens.
        """
        weights, for_fisher = inputs.pop(TOKEN_WEIGHTS), inputs.pop(FISHER_WEIGHTS, None)
        if self.filter is not None and not self._shown_equal:
            self._compare_with_own(self.filter, plain, model, inputs, num_items)
        if self.filter is None:
            return cast("tuple[Tensor, Any]", plain(model, inputs, True, num_items))
        trainer = self._trainer
        steps = trainer.current_gradient_accumulation_steps
        loss, filtered, all_tokens, outputs = self.filter.losses(
            model, inputs, weights, for_fisher, num_items, steps=steps
        )
        share = 1.0 if num_items is not None else 1.0 / steps  # the Trainer divides such a loss by itself
        if filtered is not None:
            filtered = filtered * share
            self.observer.take_gradients(
                torch.autograd.grad(filtered, self.view.parameters, retain_graph=True, allow_unused=True)
            )
        count = self._loss_factor(num_items)
        self._all_tokens = all_tokens * count * share
        return loss * count, outputs

    def _loss_factor(self, num_items: Any) -> int:
        """What the Trainer multiplies a loss with, because the mean over the processes is taken afterwards."""
        trainer = self._trainer
        if trainer.args.average_tokens_across_devices or num_items is None:
            return int(trainer.accelerator.num_processes // trainer.get_tp_size())
        return 1

    @torch.no_grad()
    def _compare_with_own(
        self, ours: TokenFilter, plain: Callable[..., Any], model: nn.Module, inputs: dict[str, Any], num_items: Any
    ) -> None:
        """Leave the loss to the Trainer unless that of all target tokens is the same, on one micro-batch."""
        devices = [] if self._trainer.args.device.type == "cpu" else [self._trainer.args.device]
        kind = self._trainer.args.device.type if devices else "cuda"
        with torch.random.fork_rng(devices, device_type=kind):
            own = plain(model, dict(inputs), False, num_items)
        with torch.random.fork_rng(devices, device_type=kind):
            mine = ours.loss_of_all(model, dict(inputs), num_items)
        if num_items is not None:
            mine = mine * self._loss_factor(num_items)
        half = any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters())
        half |= self._trainer.accelerator.mixed_precision in ("fp16", "bf16")
        close = bool(torch.isclose(mine, own.to(mine), rtol=1e-3 if half else 1e-5, atol=1e-6, equal_nan=True))
        # processes go one way: those that weigh tokens do so together
        self._shown_equal = close if self._processes.count == 1 else self._processes.mean(float(close)) == 1.0
        if not self._shown_equal:
            base = type(self.view.model.get_base_model()).__name__
            differ = (
                f"{base} with its adapter has another loss than the mean over target tokens ({own:.6g}, not {mine:.6g})"
            )
            if ours.objective != "full":
                raise ConfigError(
                    f"objective={ours.objective!r} weights the loss of single tokens, but {differ}. Use "
                    "objective='full'."
                )
            logger.info("%s: it is computed by the Trainer, on the full logits.", differ)
            self.filter = None

    def training_step(self, plain: Callable[..., Tensor], model: nn.Module, inputs: Any, num_items: Any) -> Tensor:
        """The Trainer's own `training_step`, `plain`; then Fisher information from its gradients, before clipping.

        A step with NaN or infinite gradients is skipped: nothing is read off it, and the optimizer leaves parameters
        without gradient as they are, its own state included.
        """
        batch = MicroBatch(inputs, self.done, last=self._trainer.accelerator.sync_gradients)
        self._all_tokens = None
        with contextlib.ExitStack() as hooks:
            if isinstance(inputs, Mapping) and not self._nothing_counts:  # some trainers make their inputs later
                divisor = self._loss_divisor(inputs, num_items) / self._gradient_scale()
                hooks.enter_context(self.observer.watch(self.done, inputs, divisor))
            elif self.done == 0 and not self._nothing_counts:
                logger.warning("%s makes its inputs late: no token sensitivity.", type(self._trainer).__name__)
            for method in self.methods:
                hooks.enter_context(method.forward(batch))
            loss = plain(model, inputs, num_items)
        self._parts.append(loss.detach() if self._all_tokens is None else self._all_tokens)
        if batch.last:
            self._end_backward()
        return loss

    def _gradient_scale(self) -> float:
        """What gradients are multiplied with, so that float16 can hold them; 1 without a scaler."""
        scaler = getattr(self._trainer.accelerator, "scaler", None)
        return 1.0 if scaler is None else float(scaler.get_scale())

    def _end_backward(self) -> None:
        """All gradients of an optimizer step are there."""
        parts, self._parts = self._parts, []
        scale, trained = self._gradient_scale(), (*self.view.parameters, *self.learned())
        _multiply_gradients(trained, 1 / scale)
        if self._nothing_counts or not self.observer.end_step(self.done):
            self._skip(trained)
            return
        if self._federated:
            self._losses.append(torch.stack(parts).sum())
        for method in self.methods:
            method.backward()
        _multiply_gradients(trained, scale)

    def _skip(self, trained: Sequence[nn.Parameter]) -> None:
        """Leave the parameters as they are in the step at hand."""
        self.skipped += 1
        why = "gradients are NaN or infinite"
        if self._nothing_counts:
            self.masked += 1
            why = "all its labels are masked (-100)"
            self.observer.forget_step()
        logger.warning("Local step %d: %s; it is skipped.", self.done + 1, why)
        scaled = getattr(self._trainer.accelerator, "scaler", None) is not None
        for parameter in trained:
            if not scaled:
                parameter.grad = None  # the optimizer leaves a parameter without one as it is, its own state included
            elif parameter.grad is not None:
                parameter.grad.fill_(torch.nan)  # the scaler wants gradients, and skips the step for these

    def end_step(self) -> None:
        """After an optimizer step: count it, and refuse early what could not be read at the round's end."""
        self.done += 1
        if self.done == 1 and self._fisher == "adam":
            self.fisher_vector()
        if self.done == 1 and self._keeps_optimizer and self.optimizer is not None:
            self.optimizer.dump(self.view.parameters)

    def check_some_counted(self, client_id: str, where: str) -> None:
        """Raises NonFiniteError, or DataError where all labels were masked, if all steps were skipped."""
        if self.done and self.masked == self.done:
            raise DataError(
                f"All labels of client {client_id!r} are masked (-100) in every step of {where}: there is nothing to "
                "learn from. Check that truncation keeps the answers, or raise max_length."
            )
        if self.done and self.skipped == self.done:
            raise NonFiniteError(
                f"The loss or the gradients of client {client_id!r} were NaN or infinite in every step of {where}; "
                "nothing of this round was sent. Lower the learning rate or check the data."
            )

    def result(self, num_examples: int) -> LocalResult:
        """What the round gives back."""
        carried = self.observer.carried()
        if self._keeps_optimizer and self.optimizer is not None:
            carried |= self.optimizer.dump(self.view.parameters)
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
        state["steps"] = torch.tensor([self.done, self.skipped, self.masked, self.rows])
        for method in self.methods:
            state |= {f"{method.name}.{key}": value.cpu() for key, value in method.state_dict().items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict()` returned, after `begin`."""
        self.observer.load_state_dict(state)
        self._losses = list(state["losses"].to(self._trainer.args.device).unbind())
        self.done, self.skipped, self.masked, self.rows = (int(count) for count in state["steps"])
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


def _multiply_gradients(parameters: Sequence[nn.Parameter], factor: float) -> None:
    """By a power of two, which rounds nothing."""
    if factor != 1:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(factor)


class AfterStep(TrainerCallback):  # type: ignore[misc]
    """Calls `end` after each optimizer step."""

    def __init__(self, end: Callable[[], None]) -> None:
        self._end = end

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """As in `TrainerCallback`."""
        self._end()
