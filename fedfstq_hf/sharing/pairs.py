"""The LoRA pairs in an adapter's state, and the freedom in them: B A = (B G^-1)(G A) for any invertible G.

An error is counted where it acts, in the product: `scale * sum_oi output_o input_i (B~ A~ - B A)_oi^2`, with
the weights of inputs and outputs that a calibration set gives (calibration.py), or ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_SUFFIXES = {".lora_A.weight": ".lora_B.weight", ".lora_embedding_A": ".lora_embedding_B"}


@dataclass(frozen=True)
class Pair:
    """Names of one module's two LoRA matrices, and its effect's scale (alpha / r, or as configured)."""

    module: str
    a: str
    b: str
    scaling: float = 1.0


@dataclass(frozen=True)
class PairWeights:
    """What an error in a module's product costs: float64 output (out,), input (in,), mean 1 each, times `scale`."""

    output: Tensor
    input: Tensor
    scale: float


def find_pairs(state: Mapping[str, Tensor], scaling: Mapping[str, float]) -> list[Pair]:
    """The pairs that can be multiplied, sorted by module; scaling: module name in the state -> factor of B A."""
    pairs = []
    for name in sorted(state):
        for a_suffix, b_suffix in _SUFFIXES.items():
            module, other = name.removesuffix(a_suffix), name.removesuffix(a_suffix) + b_suffix
            if name.endswith(a_suffix) and other in state and state[other].numel() % max(len(state[name]), 1) == 0:
                a, b = state[name], state[other]
                if a.dim() >= 2 and b.dim() >= 2 and b.shape[1] == len(a) and b[0].numel() == len(a):
                    pairs.append(Pair(module, name, other, scaling.get(module, 1.0)))
    return pairs


def matrices(state: Mapping[str, Tensor], pair: Pair) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r), float64 on the CPU."""
    a, b = state[pair.a], state[pair.b]
    return a.detach().double().cpu().reshape(len(a), -1), b.detach().double().cpu().reshape(len(b), -1)


def even_weights(state: Mapping[str, Tensor], pair: Pair) -> PairWeights:
    """Weights without calibration: every entry of the scaled product counts the same."""
    a, b = matrices(state, pair)
    return PairWeights(torch.ones(len(b)).double(), torch.ones(a.shape[1]).double(), pair.scaling**2)


def balance(a: Tensor, b: Tensor, weights: PairWeights) -> tuple[Tensor, Tensor]:
    """A and B of the same product whose components are orthogonal under the weights, the strongest first.

    From the singular value decomposition of the weighted product, B D_out U S^1/2 and S^1/2 V^T. What carries little
    then stands alone, and gets few bits or none.
    """
    root_out, root_in = weights.output.sqrt()[:, None], weights.input.sqrt()[:, None]
    q_b, r_b = torch.linalg.qr(root_out * b)
    q_a, r_a = torch.linalg.qr(root_in * a.T)
    u, s, vt = torch.linalg.svd(r_b @ r_a.T)
    rank = min(len(s), len(a))
    new_b, new_a = torch.zeros_like(b), torch.zeros_like(a)
    new_b[:, :rank] = (q_b @ u[:, :rank]) * s[:rank].sqrt() / root_out
    new_a[:rank] = ((q_a @ vt.T[:, :rank]) * s[:rank].sqrt() / root_in).T
    return new_a, new_b


def coordinate_weights(a: Tensor, b: Tensor, weights: PairWeights) -> tuple[Tensor, Tensor]:
    """What a small error in one coordinate of A (r, in) and of B (out, r) costs in the product."""
    of_a = (b.square() * weights.output[:, None]).sum(dim=0)
    of_b = (a.square() * weights.input).sum(dim=1)
    scale = weights.scale
    return scale * of_a[:, None] * weights.input[None, :], scale * weights.output[:, None] * of_b[None, :]


def product_error(a: Tensor, b: Tensor, other_a: Tensor, other_b: Tensor, weights: PairWeights) -> float:
    """Weighted squared difference of two products, without forming them."""
    left = torch.cat([other_b, -b], dim=1)
    right = torch.cat([other_a, a])
    gram_left = left.T @ (weights.output[:, None] * left)
    gram_right = (right * weights.input) @ right.T
    return weights.scale * max(float((gram_left * gram_right).sum()), 0.0)
