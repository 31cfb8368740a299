"""The token-filtered objective inside a Hugging Face training step: which tokens of a window count, and their loss.

A window is what one optimizer step accumulates. Its weights travel with its micro-batches as one more tensor, so that
batches of 16 and 4 x 4 give the same loss and the same gradient.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import weakref
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Trainer

from fedfstq_hf.errors import ConfigError
from fedfstq_hf.sensitivity import TokenSensitivity, token_weights
from fedfstq_hf.sensitivity.objective import weighted_and_plain

logger = logging.getLogger(__name__)

TOKEN_WEIGHTS = "token_weights"
"""Key in a micro-batch: (B, T) float32, at each position the weight of the target token that it predicts."""
FISHER_WEIGHTS = "fisher_weights"
"""Likewise, where the filter is for the Fisher information alone."""
_IGNORED = -100
_WARNED: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # a federation sets its filter up anew


class FilteredLoss(NamedTuple):
    """Of one micro-batch, each divided by the window's target tokens.

    Attributes:
        loss: the weighted one, which is optimised.
        second: with the weights that are for the Fisher information alone; None without such.
        all_tokens: an estimate of the loss of all target tokens, without gradient: exact where all are projected, the
            weighted loss where that is its expectation, NaN under `hard` between refresh steps.
        outputs: the model's; their logits are (kept positions, vocab_size) where only those were projected.
    """

    loss: Tensor
    second: Tensor | None
    all_tokens: Tensor
    outputs: Any


class TokenFilter:
    """Weighs the target tokens of each window, and computes the loss of those that weigh something.

    Only their positions go through the LM head, where the model takes a boolean `logits_to_keep`; a step then costs
    less time and memory the larger the vocabulary. At refresh steps all target tokens weigh 1, under `full` at all.

    Args:
        model: base or PEFT model, a causal language model.
        objective: `"full"`, `"hard"`, `"soft"` or `"unbiased"`.
        ratio: share of the target tokens that is kept.
        refresh_steps: local steps 0, H, 2H, ... see all tokens: there sensitivity is read.
        fisher_only: the optimizer sees all tokens at every step; the filter's weights are for a second loss at refresh
            steps, whose gradients are read off and not applied.

    Attributes:
        window_targets: number of target tokens of the window that was weighed last, over all processes.
    """

    def __init__(
        self, model: nn.Module, objective: str, ratio: float, refresh_steps: int, *, fisher_only: bool = False
    ) -> None:
        self.fisher_only = fisher_only
        self.objective, self.ratio, self.refresh_steps = objective, ratio, refresh_steps
        self._base = _base_of(model)
        self._projects_some = _takes_mask(self._base)
        self.window_targets = 0
        self._sees_all = True
        if not self._projects_some and self._base not in _WARNED:
            _WARNED.add(self._base)
            logger.warning(
                "%s cannot project single positions through its LM head (no boolean logits_to_keep, or a fused loss): "
                "objective=%r weights the full logits and saves neither time nor memory.",
                type(self._base).__name__,
                objective,
            )

    def weigh(
        self, batches: Sequence[MutableMapping[str, Any]], tokens: TokenSensitivity, *, step: int, seed: int
    ) -> None:
        """Put the weights of a window's target tokens into its micro-batches.

        Args:
            batches: of one optimizer step, with `labels` (or `shift_labels`).
            tokens: how sensitive the loss is to each id.
            step: local step, from 0.
            seed: of the round; with `step` and an example's number in the window it fixes what is drawn.
        """
        refresh = step % self.refresh_steps == 0
        if not refresh if self.fisher_only else refresh and not self._projects_some:
            return  # the Trainer's own loss
        if not all("labels" in batch or "shift_labels" in batch for batch in batches):
            return  # the Trainer says what is missing
        on_device = [_targets(batch) for batch in batches]
        targets = [target.cpu() for target in on_device]
        width = max((t.shape[1] for t in targets), default=0)
        rows = [F.pad(t, (0, width - t.shape[1]), value=_IGNORED) for t in targets]
        window = torch.cat(rows) if rows else torch.zeros(0, 0, dtype=torch.long)
        valid = window != _IGNORED
        self.window_targets = int(valid.sum())

        def deal(name: str, objective: str) -> None:
            weights = valid.float()
            if objective != "full":
                scores = tokens.scores_of(window.clamp_min(0))
                generator = torch.Generator().manual_seed(_seed(seed, step))
                weights = token_weights(objective, scores, valid, ratio=self.ratio, generator=generator).float()
            start = 0
            for batch, target in zip(batches, on_device, strict=True):
                end = start + len(target)
                batch[name] = weights[start:end, : target.shape[1]].to(target.device)
                start = end

        self._sees_all = refresh or self.objective in ("full", "soft")
        deal(TOKEN_WEIGHTS, "full" if refresh else self.objective)
        if self.fisher_only:
            deal(FISHER_WEIGHTS, self.objective)

    def losses(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        weights: Tensor,
        for_fisher: Tensor | None,
        num_items: Tensor | int | None,
        *,
        steps: int,
    ) -> FilteredLoss:
        """The weighted loss of one micro-batch, and a second one with other weights from the same forward pass.

        Args:
            model: as the Trainer wrapped it.
            inputs: the micro-batch, without its weights.
            weights: (B, T) from `weigh`, `TOKEN_WEIGHTS`.
            for_fisher: (B, T), `FISHER_WEIGHTS`, where `weights` are above 0 or nowhere; None for no second loss.
            num_items: target tokens of the window, over all processes; None where the Trainer divides the loss by the
                number of micro-batches itself.
            steps: that number.
        """
        targets = _targets(inputs)
        kept = targets != _IGNORED if self.objective == "soft" else weights > 0  # soft projects all, however light
        rest = {name: value for name, value in inputs.items() if name not in ("labels", "shift_labels")}
        if self._projects_some:
            rest["logits_to_keep"] = kept
        outputs = model(**rest)
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
        if logits.ndim == 3:
            logits = logits[kept]
        items = self.window_targets / steps if num_items is None else num_items

        def means(given: Tensor) -> tuple[Tensor, Tensor]:
            totals = weighted_and_plain(logits, targets[kept].to(logits.device), given[kept].to(logits.device))
            return tuple(t / (items.to(t.device) if isinstance(items, Tensor) else items) for t in totals)  # type: ignore[return-value]

        (loss, plain), second = means(weights), None if for_fisher is None else means(for_fisher)[0]
        if not self._sees_all:
            plain = loss.detach() if self.objective == "unbiased" else torch.full_like(plain, torch.nan)
        auxiliary = outputs.get("aux_loss") if isinstance(outputs, dict) else None
        if auxiliary is not None:  # as models with experts add it to their own loss
            loss = loss + self._base.router_aux_loss_coef * auxiliary.to(loss.device)
        return FilteredLoss(loss, second, plain, outputs)

    def loss_of_all(self, model: nn.Module, inputs: dict[str, Any], num_items: Tensor | int | None) -> Tensor:
        """The loss in which every target token weighs 1: over `num_items`, or the mean where that is None."""
        counted = _targets(inputs) != _IGNORED
        items = counted.sum() if num_items is None else num_items
        return self.losses(model, inputs, counted.float(), None, items, steps=1).loss


def open_filter(
    trainer: Any, objective: str, ratio: float, refresh_steps: int, *, fisher_only: bool = False
) -> TokenFilter | None:
    """The filter of a Trainer; None where the full objective is left to the Trainer's own loss.

    The full objective goes through the filter wherever that gives the same loss: it then projects no prompt and keeps
    one tensor of the logits' size less.

    Raises:
        ConfigError: the objective weights tokens, and the Trainer's loss is not the plain one of a causal language
            model, per token.
    """
    obstacle = _obstacle(trainer)
    if objective == "full":
        plain = obstacle is None and _own_loss(trainer) and _takes_mask(_base_of(trainer.model))
        return TokenFilter(trainer.model, objective, 1.0, refresh_steps) if plain else None
    if obstacle is not None:
        raise ConfigError(
            f"objective={objective!r} weights the loss of single tokens and cannot be combined with {obstacle}. "
            "Use objective='full'."
        )
    return TokenFilter(trainer.model, objective, ratio, refresh_steps, fisher_only=fisher_only)


def _obstacle(trainer: Any) -> str | None:
    """What makes the Trainer's loss another one than the mean over target tokens."""
    args = trainer.args
    obstacles = {
        f"label_smoothing_factor={args.label_smoothing_factor}": args.label_smoothing_factor != 0,
        "compute_loss_func": trainer.compute_loss_func is not None,
        f"loss_type={getattr(args, 'loss_type', None)!r}": getattr(args, "loss_type", None) not in (None, "nll"),
        f"{args.n_gpu} GPUs in one process (use `accelerate launch`)": args.n_gpu > 1,
        "a model that is not a causal language model": not trainer._loss_shifts_labels,
    }
    return next((obstacle for obstacle, present in obstacles.items() if present), None)


def _own_loss(trainer: Any) -> bool:
    """Whether nobody between ours and transformers' Trainer computes the loss, and the model's is the usual one."""
    overriding = [kind for kind in type(trainer).__mro__ if "compute_loss" in vars(kind)]
    ours = all(kind.__module__.startswith(__package__.partition(".")[0]) for kind in overriding[:-1])
    return ours and overriding[-1] is Trainer and getattr(_base_of(trainer.model), "loss_type", None) == "ForCausalLM"


def _targets(batch: Mapping[str, Any]) -> Tensor:
    """(B, T) ids that each position predicts, -100 where none."""
    if "shift_labels" in batch:
        return batch["shift_labels"]  # type: ignore[no-any-return]
    return F.pad(batch["labels"][..., 1:], (0, 1), value=_IGNORED)


def count_targets(batch: Mapping[str, Any], *, shifted: bool) -> Tensor | int:
    """Number of target tokens of a micro-batch; of its rows where it has no labels.

    shifted: the loss shifts the labels, as that of a causal language model does.
    """
    labels = batch.get("labels", batch.get("shift_labels"))
    if not isinstance(labels, Tensor):
        return max(1, count_rows(batch))
    return (_targets(batch) if shifted else labels).ne(_IGNORED).sum()


def count_rows(batch: Any) -> int:
    """Of a micro-batch: of its first tensor, or of a list."""
    if isinstance(batch, Mapping):
        return next((len(value) for value in batch.values() if isinstance(value, Tensor) and value.ndim), 0)
    return len(batch) if isinstance(batch, Sequence) else 0


def _seed(seed: int, step: int) -> int:
    return int.from_bytes(hashlib.sha256(f"token mask/{seed}/{step}".encode()).digest()[:7], "big")


def _base_of(model: Any) -> Any:
    inner = getattr(model, "get_base_model", None)
    return model if inner is None else inner()


def _takes_mask(base: Any) -> bool:
    """Whether the forward pass is transformers' own, which projects the positions of a (B, T) bool `logits_to_keep`."""
    forward = inspect.unwrap(base.forward)
    names = inspect.signature(forward).parameters
    return "logits_to_keep" in names and "slice_logits_to_keep" in getattr(forward, "__globals__", {})
