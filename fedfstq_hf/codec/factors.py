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

_SWEEPS = 2
_SKETCH = 1024  # features from which s is found, at least: it goes on a coarse grid, and t is then found for all
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
    members = torch.arange(rest.shape[0], device="cpu")
    few = slice(None, None, max(1, rest.shape[2] // _SKETCH))
    part, part_weight = rest, weight
    sketch = weight[:, :, few].contiguous()
    for _ in range(most_components(stack.r)):
        product = part_weight * part
        points, s, density = _direction(product[:, :, few].contiguous(), part[:, :, few], sketch, price, exponent)
        t, saved, sent = _signs(product, part_weight, s, density, price)
        count, density = _density(sent)
        gain = (saved * sent).sum(dim=1)
        per_feature = -density * density.log2() - (1 - density) * (1 - density).log2()
        bits = (_HEAD_BITS + ROW_BITS * stack.r) / scale + t.shape[1] * per_feature + count
        good = gain > price * bits
        if not bool(good.any()):
            break
        keep = slice(None) if bool(good.all()) else good.nonzero().reshape(-1)
        s, t = s[keep], t[keep]
        layers.append(Layer(members[keep], points[keep], s, t, scale * gain[keep], scale * bits[keep]))
        if isinstance(keep, Tensor):
            if part is not rest:
                rest[members] = part
            part, part_weight, sketch, members = part[keep], part_weight[keep], sketch[keep], members[keep]
        torch.baddbmm(part, s[:, :, None], t[:, None], alpha=-1, out=part)
    if part is not rest:
        rest[members] = part
    return layers


def _direction(
    product: Tensor, part: Tensor, weight: Tensor, price: float, exponent: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Grid points of s and s itself (m, r), by alternation, and the share of features last taken to be sent (m,)."""
    t, mass = _start(product, part), weight.sum(dim=2)
    density = torch.full((product.shape[0],), _DENSE_START, device="cpu")
    for _ in range(_SWEEPS):
        t, _, sent = _signs(
            product, weight, torch.bmm(t[:, None], product.transpose(1, 2))[:, 0] / mass, density, price
        )
        density = _density(sent)[1]
        mass = torch.bmm(t.abs()[:, None], weight.transpose(1, 2))[:, 0].clamp_min_(1e-30)
    points, s = _on_grid(torch.bmm(t[:, None], product.transpose(1, 2))[:, 0] / mass, exponent)
    return points, s, density


def _signs(product: Tensor, weight: Tensor, s: Tensor, density: Tensor, price: float) -> tuple[Tensor, Tensor, Tensor]:
    """Best t for given s, what each feature saves, and which are worth sending: all (m, f)."""
    projection = torch.bmm(s[:, None], product)[:, 0]
    saved = projection.abs().mul_(2).sub_(torch.bmm(s.square()[:, None], weight)[:, 0])
    cost = 1 + ((1 - density) / density).log2().clamp_min_(0)
    sent = saved > (price * cost)[:, None]
    return projection.sign_().mul_(sent), saved, sent


def _density(sent: Tensor) -> tuple[Tensor, Tensor]:
    """Number and share of the features that are sent, the share within 0 and 1: (m,)."""
    count, f = sent.sum(dim=1), sent.shape[1]
    return count, (count / f).clamp(0.5 / f, 1 - 0.5 / f)


def _start(product: Tensor, part: Tensor) -> Tensor:
    """Signs of the row with the most energy: (m, f)."""
    row = (product * part).sum(dim=2).argmax(dim=1)
    return torch.where(product[torch.arange(row.numel(), device="cpu"), row] < 0, -1.0, 1.0)


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
