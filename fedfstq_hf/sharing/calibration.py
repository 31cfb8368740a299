"""What matters to an adapter's own task: Fisher information from a calibration set, as weights of inputs and outputs.

The diagonal Fisher of a LoRA pair is (nearly) a product: of the squared gradient at each output and the squared
activation at each input of its module. Its row and column sums give the two, with far less noise than single entries.

The weights are the roots of these: an adapter that fits its task has gradients from a few hard examples only, and bits
that follow their squares leave the rest of the task behind (measured: docs/sharing.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from fedfstq_hf.errors import DataError, NonFiniteError
from fedfstq_hf.sensitivity import AdapterFisher
from fedfstq_hf.sharing.pairs import Pair, PairWeights, matrices

_LONG_MEMORY = 0.9999  # all batches of a calibration set count alike
_FLOOR = 1e-2  # weight of an input or output at least, as a share of the mean: a few batches do not prove it useless


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
    before, was_training = [p.requires_grad for p in params], model.training
    model.eval()
    examples = 0
    try:
        for p in params:
            p.requires_grad_(True)
        with torch.enable_grad():
            for batch in batches:
                loss = model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss
                if loss is None or not bool(torch.isfinite(loss)):
                    raise NonFiniteError(
                        f"The calibration loss is {None if loss is None else loss.item()} in batch {examples}; "
                        "expected batches with labels, some of them not -100, and an adapter without NaN."
                    )
                fisher.update(torch.autograd.grad(loss, params, allow_unused=True))
                examples += len(batch["input_ids"])
    finally:
        for p, needed in zip(params, before, strict=True):
            p.requires_grad_(needed)
        model.train(was_training)
    if not examples:
        raise DataError("The calibration set is empty; give some tens of examples of the adapter's task, or None.")
    parts = torch.split(fisher.vector().cpu(), [p.numel() for p in params])
    return {name: part.view(p.shape) for name, part, p in zip(names, parts, params, strict=True)}, examples


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
