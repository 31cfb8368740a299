"""Sparse sign factors: fits s t^T, s a short vector on a grid, t of -1, 0, 1, to a weighted update.

LoRA gradients are nearly of rank one along the rank dimension, and few features matter much: one sign per feature that
does, and one number per rank row, say much of an update in few bits. Features enter t by what they save per bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from .components import DEEPEST, STEPS, most_components
from .quantization import OCTAVES, grid, lowest_octave
from .stacks import Stack

_SWEEPS = 3
_DENSE_START = 0.7  # share of features taken to be sent before the first sweep
ROW_BITS = 3.6  # sign and magnitude of one entry of s, by estimate
_HEAD_BITS = 5.0  # density class and count


@dataclass(frozen=True)
class Layer:
    """One component of several matrices of a stack.

    members: positions in the stack (n,). points: grid points of s (n, r). s: (n, r), scaled as the source is.
    t: (n, f) of -1, 0, 1. gain: weighted squared error saved (n,). bits: by estimate (n,).
    """

    members: Tensor
    points: Tensor
    s: Tensor
    t: Tensor
    gain: Tensor
    bits: Tensor


def fit(stack: Stack, rest: Tensor, weight: Tensor, price: float, exponent: int, scale: float = 1.0) -> list[Layer]:
    """Components of each matrix of a stack, most saving first, while they save at least `price` per bit.

    rest: (m, r, f), overwritten by what the components leave. scale: features that each one here stands for.
    """
    layers: list[Layer] = []
    members = torch.arange(rest.shape[0])
    part, part_weight, total = rest, weight, weight.sum(dim=2)
    for _ in range(most_components(stack.r)):
        product = part_weight * part
        t = _start(product, part)
        density = torch.full((members.numel(),), _DENSE_START)
        mass = total
        for sweep in range(_SWEEPS):
            s = torch.bmm(t[:, None], product.transpose(1, 2))[:, 0] / mass
            if sweep == _SWEEPS - 1:
                points, s = _on_grid(s, exponent)
            projection = torch.bmm(s[:, None], product)[:, 0]
            saved = projection.abs().mul_(2).sub_(torch.bmm(s.square()[:, None], part_weight)[:, 0])
            cost = 1 + ((1 - density) / density).log2().clamp_min_(0)
            sent = saved > (price * cost)[:, None]
            t = projection.sign_().mul_(sent)
            count = sent.sum(dim=1)
            density = (count / t.shape[1]).clamp(0.5 / t.shape[1], 1 - 0.5 / t.shape[1])
            if sweep < _SWEEPS - 1:
                mass = torch.bmm(t.abs()[:, None], part_weight.transpose(1, 2))[:, 0].clamp_min_(1e-30)
        gain = (saved * sent).sum(dim=1)
        per_feature = -density * density.log2() - (1 - density) * (1 - density).log2()
        bits = (_HEAD_BITS + ROW_BITS * stack.r) / scale + t.shape[1] * per_feature + count
        good = gain > price * bits
        if not bool(good.any()):
            break
        keep = slice(None) if bool(good.all()) else good.nonzero().reshape(-1)
        s, t, members = s[keep], t[keep], members[keep]
        layers.append(Layer(members, points[keep], s, t, scale * gain[keep], scale * bits[keep]))
        if isinstance(keep, Tensor):
            part, part_weight, total = part[keep], part_weight[keep], total[keep]
        torch.baddbmm(part, s[:, :, None], t[:, None], alpha=-1, out=part)
        if part is not rest:
            rest[members] = part
    return layers


def _start(product: Tensor, part: Tensor) -> Tensor:
    """Signs of the row with the most energy: (m, f)."""
    row = (product * part).sum(dim=2).argmax(dim=1)
    return torch.where(product[torch.arange(row.numel()), row] < 0, -1.0, 1.0)


@lru_cache(maxsize=64)
def _scaled_grid(exponent: int) -> Tensor:
    magnitudes = np.ldexp(grid(STEPS).astype(np.float64), -exponent)
    return torch.from_numpy(np.minimum(magnitudes, np.finfo(np.float32).max).astype(np.float32))


def _on_grid(s: Tensor, exponent: int) -> tuple[Tensor, Tensor]:
    """Nearest grid points of |s| * 2^exponent, in logarithms, and s at those points."""
    offset = STEPS * (exponent - lowest_octave())
    points = (s.abs().log2_() * STEPS).round_().clamp_min_(-4.0 * OCTAVES * STEPS).long() + offset
    points = torch.maximum(points, points.max(dim=1, keepdim=True).values - DEEPEST).clamp_(0, OCTAVES * STEPS - 1)
    magnitude = _scaled_grid(exponent)[points]
    return points, torch.where(s < 0, -magnitude, magnitude)
