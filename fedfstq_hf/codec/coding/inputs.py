"""What codecs are given, as flat vectors: a delta and its Fisher information, checked."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...errors import ConfigError, NonFiniteError
from ..schema import Schema


def read_delta(delta: Mapping[str, Tensor]) -> tuple[Schema, Tensor]:
    """Schema and flat CPU float32 vector of a delta. Raises NonFiniteError naming the first bad tensor."""
    schema = Schema.from_state_dict(delta)
    vector = schema.flatten(delta)
    _check_finite(schema, vector, "update")
    return schema, vector


def read_fisher(schema: Schema, fisher: Mapping[str, Tensor] | None) -> Tensor | None:
    """Flat CPU float32 Fisher, or None. Raises NonFiniteError on NaN or infinity, ConfigError on negative entries."""
    if fisher is None:
        return None
    vector = schema.flatten(fisher)
    _check_finite(schema, vector, "Fisher information")
    if vector.numel() and float(vector.min()) < 0:
        raise ConfigError("Fisher information has negative entries; expected means of squared gradients")
    return vector


def largest_magnitude(schema: Schema, state: Mapping[str, Tensor], what: str, *, signed: bool = True) -> float:
    """Largest |entry| of a state dict, without copying it.

    Raises AdapterMismatchError unless names and shapes are the schema's, NonFiniteError on NaN or infinity, and
    ConfigError on entries below 0 that are not `signed`.
    """
    schema.check(state)
    lows, highs = [], []
    for spec in schema.tensors:
        if spec.size:
            low, high = torch.aminmax(state[spec.name].detach())
            lows.append(low.float().cpu())
            highs.append(high.float().cpu())
    if not lows:
        return 0.0
    low, high = torch.stack(lows).min(), torch.stack(highs).max()
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        _check_finite(schema, schema.flatten(state), what)
    if not signed and float(low) < 0:
        raise ConfigError(f"{what} has negative entries; expected means of squared gradients")
    return max(abs(float(low)), abs(float(high)))


def _check_finite(schema: Schema, vector: Tensor, what: str) -> None:
    # one reduction on the good path: a sum of zeros is NaN exactly if an entry was NaN or infinite
    if torch.isfinite((vector * 0).sum()):
        return
    for spec in schema.tensors:
        part = vector[spec.offset : spec.offset + spec.size]
        if not bool(torch.isfinite(part).all()):
            raise NonFiniteError(
                f"{what} of tensor {spec.name!r} holds NaN or infinity in {int((~torch.isfinite(part)).sum())} of "
                f"{spec.size} entries; nothing was encoded. Lower the learning rate or skip the step"
            )
