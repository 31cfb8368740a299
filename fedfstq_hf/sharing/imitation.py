"""How far an approximate adapter's predictions lie from those of the trained one and from the answers, on examples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import nll_loss

from fedfstq_hf.running.evaluate import logits_at
from fedfstq_hf.sharing.trained import TrainedAdapter
from fedfstq_hf.workloads.examples import IGNORED_LABEL, collate

Measure = Callable[[Mapping[str, Tensor], Tensor, Tensor], Tensor]


def predicts_tokens(config: Mapping[str, Any]) -> bool:
    """Whether an adapter is for next-token prediction, by PEFT's configuration: what is compared here."""
    kind = config.get("task_type")
    return kind is None or str(getattr(kind, "value", kind)) == "CAUSAL_LM"


class Imitation:
    """Compares next-token distributions at target tokens (those with a label), the trained adapter's with others'.

    examples: as for calibration. The model is in evaluation mode meanwhile, and left as it was.
    """

    def __init__(self, adapter: TrainedAdapter, examples: Sequence[Mapping[str, Any]], batch_size: int) -> None:
        self._adapter, self._examples, self._batch_size = adapter, examples, batch_size

    def __len__(self) -> int:
        return len(self._examples)

    def divergences(self, states: Sequence[Mapping[str, Tensor]], at_most: int | None = None) -> list[float]:
        """Mean Kullback-Leibler divergence per target token of each state, in nats; NaN if there is no token.

        at_most: examples to look at, the first ones; None: all.
        """
        return self._means(states, at_most, self._divergences)

    def errors(self, states: Sequence[Mapping[str, Tensor]], at_most: int | None = None) -> list[float]:
        """The same of divergence plus loss: what refinement lowers."""
        return self._means(states, at_most, self._errors)

    @torch.no_grad()
    def _means(self, states: Sequence[Mapping[str, Tensor]], at_most: int | None, measure: Measure) -> list[float]:
        count = len(self) if at_most is None else min(at_most, len(self))
        totals, tokens = [0.0] * len(states), 0
        with self._evaluating():
            for start in range(0, count, self._batch_size):
                batch, keep, wanted = self._trained(range(start, min(start + self._batch_size, count)))
                tokens += len(wanted)
                for number, state in enumerate(states):
                    with self._adapter.replaced(state):
                        totals[number] += float(measure(batch, keep, wanted).sum())
        return [total / tokens if tokens else math.nan for total in totals]

    def gradient(self, state: Mapping[str, Tensor], picks: Sequence[int]) -> dict[str, Tensor]:
        """Gradient of the mean error over some examples, float32 on the CPU, for the tensors of `state`.

        The error of a target token is the divergence plus the loss: imitation alone cannot know which errors of the
        rounding the task forgives.
        """
        params = [self._adapter.parameters[name] for name in state]
        before = [p.requires_grad for p in params]
        with self._evaluating():
            batch, keep, wanted = self._trained(picks)
            # autograd reads the values that the parameters have when it runs backwards
            with self._adapter.replaced(state), torch.enable_grad():
                try:
                    for p in params:
                        p.requires_grad_(True)
                    loss = self._errors(batch, keep, wanted).mean()
                    found = torch.autograd.grad(loss, params)
                finally:
                    for p, needed in zip(params, before, strict=True):
                        p.requires_grad_(needed)
        return {name: g.float().cpu() for name, g in zip(state, found, strict=True)}

    @torch.no_grad()
    def _trained(self, picks: Sequence[int]) -> tuple[Mapping[str, Tensor], Tensor, Tensor]:
        """A batch, which of its positions (B, T) predict a target, and trained log-probabilities (tokens, vocab)."""
        # the padding's value does not matter: it is masked, and has no label
        batch = collate([self._examples[i] for i in picks], pad_id=0)
        keep = torch.zeros_like(batch["labels"], dtype=torch.bool)
        keep[:, :-1] = batch["labels"][:, 1:] != IGNORED_LABEL
        return batch, keep, self._log_probabilities(batch, keep)

    def _divergences(self, batch: Mapping[str, Tensor], keep: Tensor, wanted: Tensor) -> Tensor:
        """Of every target token (tokens,)."""
        return (wanted.exp() * (wanted - self._log_probabilities(batch, keep))).sum(dim=-1)

    def _errors(self, batch: Mapping[str, Tensor], keep: Tensor, wanted: Tensor) -> Tensor:
        """Divergence plus loss of every target token (tokens,)."""
        found = self._log_probabilities(batch, keep)
        answers = batch["labels"][:, 1:][keep[:, :-1]].to(found.device)
        return (wanted.exp() * (wanted - found)).sum(dim=-1) + nll_loss(found, answers, reduction="none")

    def _log_probabilities(self, batch: Mapping[str, Tensor], keep: Tensor) -> Tensor:
        model = self._adapter.model
        return logits_at(model, batch, keep, next(model.parameters()).device).float().log_softmax(dim=-1)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        was_training = self._adapter.model.training
        self._adapter.model.eval()
        try:
            yield
        finally:
            self._adapter.model.train(was_training)
