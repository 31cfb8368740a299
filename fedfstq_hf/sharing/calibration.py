"""What matters to an adapter's own task, by a calibration set: Fisher information as weights, and predictions.

A pair leaves freedom: B A = (B G^-1)(G A) for any invertible G. An error is counted where it acts, in the product:
`scale * sum_oi output_o input_i (B~ A~ - B A)_oi^2`.

The diagonal Fisher of a LoRA pair is (nearly) a product: of the squared gradient at each output and the squared
activation at each input of its module. Its row and column sums give the two, with far less noise than single entries.

The weights are the roots of these: an adapter that fits its task has gradients from a few hard examples only, and bits
that follow their squares leave the rest of the task behind (measured: docs/sharing.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import nll_loss

from fedfstq_hf.errors import DataError, NonFiniteError
from fedfstq_hf.running.evaluate import logits_at
from fedfstq_hf.sensitivity import AdapterFisher
from fedfstq_hf.sharing.trained import Pair, TrainedAdapter
from fedfstq_hf.workloads.examples import IGNORED_LABEL, collate

_LONG_MEMORY = 0.9999  # all batches of a calibration set count alike
_FLOOR = 1e-2  # weight of an input or output at least, as a share of the mean: a few batches do not prove it useless


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and afterwards in the mode that it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def differentiable(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Gradients of these parameters can be taken, whether or not they are trained."""
    before = [p.requires_grad for p in parameters]
    try:
        for p in parameters:
            p.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for p, needed in zip(parameters, before, strict=True):
            p.requires_grad_(needed)


@dataclass(frozen=True)
class PairWeights:
    """What an error in a module's product costs: float64 output (out,), input (in,), mean 1 each, times `scale`."""

    output: Tensor
    input: Tensor
    scale: float


def adapter_fisher(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], batches: Iterable[Mapping[str, Tensor]]
) -> tuple[dict[str, Tensor], int]:
    """Mean squared gradient per batch of every adapter tensor, float32 on the CPU, and the number of examples.

    One forward and backward pass per batch; the model is in evaluation mode meanwhile, and left as it was.

    Raises:
        DataError: there is no batch, or a batch has no target token.
        NonFiniteError: the loss or a gradient is NaN or infinite.
    """
    names, params = list(parameters), list(parameters.values())
    fisher = AdapterFisher(params, rho=_LONG_MEMORY)
    device = next(model.parameters()).device
    examples = 0
    with evaluating(model), differentiable(params):
        for batch in batches:
            loss = model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss
            if loss is None or not bool(torch.isfinite(loss)):
                raise NonFiniteError(
                    f"The calibration loss is {None if loss is None else loss.item()} in batch {examples}; "
                    "expected batches with labels, some of them not -100, and an adapter without NaN."
                )
            fisher.update(torch.autograd.grad(loss, params, allow_unused=True))
            examples += len(batch["input_ids"])
    if not examples:
        raise DataError("The calibration set is empty; give some tens of examples of the adapter's task, or None.")
    parts = torch.split(fisher.vector().cpu(), [p.numel() for p in params])
    return {name: part.view(p.shape) for name, part, p in zip(names, parts, params, strict=True)}, examples


def matrices(state: Mapping[str, Tensor], pair: Pair) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r), float64 on the CPU."""
    a, b = state[pair.a], state[pair.b]
    return a.detach().double().cpu().reshape(len(a), -1), b.detach().double().cpu().reshape(len(b), -1)


def even_weights(state: Mapping[str, Tensor], pair: Pair) -> PairWeights:
    """Weights without calibration: every entry of the scaled product counts the same."""
    a, b = matrices(state, pair)
    return PairWeights(torch.ones(len(b)).double(), torch.ones(a.shape[1]).double(), pair.scaling**2)


def pair_weights(state: Mapping[str, Tensor], fisher: Mapping[str, Tensor], pair: Pair) -> PairWeights:
    """Weights of one module's product: roots of its factors of the Fisher information, and of their common scale."""
    a, b = matrices(state, pair)
    fisher_a, fisher_b = matrices(fisher, pair)
    of_input, of_output = _floored(fisher_a.sum(dim=0)), _floored(fisher_b.sum(dim=1))
    # the common factor, once as A sees it and once as B does
    through_b = float((b.square() * of_output[:, None]).sum()) * len(of_input)
    through_a = float((a.square() * of_input).sum()) * len(of_output)
    seen = [float(f.sum()) / t for f, t in ((fisher_a, through_b), (fisher_b, through_a)) if t > 0 and f.sum() > 0]
    scale = 1.0
    for value in seen:
        scale *= value ** (1 / len(seen))
    return PairWeights(_root(of_output), _root(of_input), math.sqrt(scale) if seen else 0.0)


def _root(weights: Tensor) -> Tensor:
    root = weights.sqrt()
    return root / root.mean()


def _floored(sums: Tensor) -> Tensor:
    mean = float(sums.mean())
    if mean <= 0:
        return torch.ones_like(sums)
    floored = sums / mean + _FLOOR
    return floored / floored.mean()


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
        with evaluating(self._adapter.model):
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
        with evaluating(self._adapter.model):
            batch, keep, wanted = self._trained(picks)
            # autograd reads the values that the parameters have when it runs backwards
            with self._adapter.replaced(state), differentiable(params):
                found = torch.autograd.grad(self._errors(batch, keep, wanted).mean(), params)
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
