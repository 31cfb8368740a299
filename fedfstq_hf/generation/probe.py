"""A linear probe from early hidden states to `log g`, fitted on the gradients of training's refresh steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fedfstq_hf.errors import AdapterMismatchError, ConfigError, DataError
from fedfstq_hf.generation.blocks import BlockInput
from fedfstq_hf.generation.scorers import early_scores


class Probe:
    """Score = w . h + b with h the hidden state after the first `layer` blocks.

    weight: (H,) float, H the model's hidden size. Unlike the table it sees a token's context before it.
    """

    def __init__(self, weight: Tensor, bias: float = 0.0, layer: int = 1) -> None:
        if weight.ndim != 1 or layer < 0:
            raise ConfigError(f"weight has shape {tuple(weight.shape)}, layer is {layer}; expected (H,) and >= 0")
        self.weight = weight.detach().float().cpu()
        self.bias = bias
        self.layer = layer

    def scores(self, model: Any, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, T) float32, higher = keep: an estimate of `log g`."""
        return early_scores(self, model, input_ids, attention_mask)

    def score_block(self, inputs: BlockInput) -> Tensor:
        """(B, T) float32 from what reaches block number `layer`."""
        if inputs.hidden.shape[-1] != len(self.weight):
            raise ConfigError(
                f"the probe was fitted on hidden size {len(self.weight)}, this model has {inputs.hidden.shape[-1]}"
            )
        return inputs.hidden.float() @ self.weight.to(inputs.hidden.device) + self.bias


class ProbeFit:
    """Ridge regression of `log g` on hidden states, one refresh step at a time; memory H x H, whatever the data.

    Usage: `update()` with the hidden states of refresh steps and their `g`, then `solve()`.
    """

    def __init__(self, hidden_size: int, layer: int = 1, ridge: float = 1e-2) -> None:
        self.layer, self.ridge = layer, ridge
        self._gram = torch.zeros(hidden_size + 1, hidden_size + 1, dtype=torch.float64)
        self._moment = torch.zeros(hidden_size + 1, dtype=torch.float64)
        self.num_tokens = 0

    def update(self, hidden: Tensor, g: Tensor, mask: Tensor) -> None:
        """Take in one step. hidden: (..., H) before block `layer`. g: (...) >= 0. mask: (...), 1 = counts."""
        keep = mask.bool() & (g > 0)
        rows = hidden.detach()[keep].double().cpu()
        rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=torch.float64)], dim=1)
        targets = g.detach()[keep].double().cpu().log()
        if not bool(torch.isfinite(targets).all() and torch.isfinite(rows).all()):
            raise DataError("hidden states or gradients hold NaN or infinity; the probe was left as it was")
        self._gram += rows.T @ rows
        self._moment += rows.T @ targets
        self.num_tokens += len(rows)

    def state_dict(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """What a later round goes on from, rounded to `dtype`; of the symmetric matrix the upper triangle.

        In float64 it is exact.
        """
        return {
            "gram": self._gram[self._upper()].to(dtype),
            "moment": self._moment.to(dtype),
            "layer": torch.tensor(self.layer),
            "tokens": torch.tensor(self.num_tokens),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore `state_dict()`. Raises AdapterMismatchError if it is of another hidden size or layer."""
        size = len(self._moment)
        shapes = {name: tuple(value.shape) for name, value in state.items()}
        if shapes != {
            "gram": (size * (size + 1) // 2,),
            "moment": (size,),
            "layer": (),
            "tokens": (),
        } or self.layer != (int(state["layer"])):
            raise AdapterMismatchError(
                f"probe state has {shapes}; expected that of hidden size {size - 1} at layer {self.layer}"
            )
        gram = torch.zeros_like(self._gram)
        gram[self._upper()] = state["gram"].double()
        self._gram = gram + gram.triu(1).T
        self._moment = state["moment"].double().clone()
        self.num_tokens = int(state["tokens"])

    def _upper(self) -> Tensor:
        return torch.ones(self._gram.shape, dtype=torch.bool).triu()

    def solve(self) -> Probe:
        """The fitted probe. Raises DataError before the first token."""
        if not self.num_tokens:
            raise DataError("the probe has seen no token with a gradient; call update() at refresh steps first")
        scale = self._gram.diagonal()[:-1].mean().clamp_min(1e-12)
        penalty = torch.full((len(self._gram),), float(self.ridge * scale), dtype=torch.float64)
        penalty[-1] = 0.0
        solution = torch.linalg.solve(self._gram + torch.diag(penalty), self._moment)
        return Probe(solution[:-1].float(), float(solution[-1]), self.layer)
