"""Tensors of one shape, read a few at a time: what an encoder works on without copying a whole adapter.

A LoRA factor has a small side r (the rank) and a large side f (features); both orientations are seen as (r, f).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from .dense import largest_magnitude
from .schema import Schema, TensorSpec

_CHUNK = 1 << 18  # coordinates of a stack: its working set stays in a core's cache
_FEWEST = 512  # features that a sample keeps at least: from fewer, factors seem to explain more than they do
# weight of a coordinate at least, as a share of its matrix's mean and of the largest: unseen ones come last, but come
_FLOOR, _LEAST = 1e-3, 1e-12
POWERS = (0.25, 0.375, 0.5, 0.75, 1.0)
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Stack:
    """Numbers of tensors that share (r, f) and orientation. tall: stored as (f, r)."""

    tensors: tuple[int, ...]
    r: int
    f: int
    tall: bool


def sides(spec: TensorSpec) -> tuple[int, int]:
    """(r, f) with r <= f; vectors are (1, size)."""
    rows = spec.shape[0] if spec.shape else 1
    width = spec.size // max(rows, 1)
    return (min(rows, width), max(rows, width)) if min(rows, width) >= 2 else (1, spec.size)


def is_tall(spec: TensorSpec) -> bool:
    """Whether a tensor is stored as (f, r) with r < f."""
    r, f = sides(spec)
    return r >= 2 and r != f and spec.shape[0] == f


def stacks_of(schema: Schema, thin: int = 1) -> list[Stack]:
    """All non-empty tensors, in stacks of which every `thin`-th feature makes about a quarter of a million."""
    groups: dict[tuple[int, int, bool], list[int]] = {}
    for i, spec in enumerate(schema.tensors):
        if spec.size:
            groups.setdefault((*sides(spec), is_tall(spec)), []).append(i)
    stacks = []
    for (r, f, tall), members in groups.items():
        step = max(1, _CHUNK * thin_for(f, thin) // (r * f))
        stacks += [Stack(tuple(members[i : i + step]), r, f, tall) for i in range(0, len(members), step)]
    return stacks


def thin_for(f: int, wanted: int) -> int:
    """How thin a sample of f features may be: `wanted` at most, keeping enough features to say something."""
    return max(1, min(wanted, f // _FEWEST))


@contextmanager
def one_thread() -> Iterator[int]:
    """Within it, each of torch's operations runs in one thread; yields the number of threads that torch had before.

    Stacks are too small to share: on a busy machine, waiting for each other takes threads many times the work. It also
    makes results independent of the number of threads.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def each(function: Callable[[Item], Result], items: Sequence[Item], threads: int) -> list[Result]:
    """The function of every item, in their order, several items at a time."""
    if threads == 1 or len(items) < 2:
        return [function(item) for item in items]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, items))


class Source:
    """An update and its weights, scaled to magnitudes of at most 1 by powers of two, read stack by stack.

    power: of the Fisher information; below 1 it trusts its extremes less. Raises as `largest_magnitude` does.
    Attributes: exponent, such that values here are those of the update times 2^-exponent.
    """

    def __init__(
        self, schema: Schema, delta: Mapping[str, Tensor], fisher: Mapping[str, Tensor] | None, power: float
    ) -> None:
        self.schema = schema
        self._delta = delta
        self.exponent = math.frexp(largest_magnitude(schema, delta, "update"))[1]
        largest = 0.0 if fisher is None else largest_magnitude(schema, fisher, "Fisher information", signed=False)
        self._fisher = fisher if largest > 0 else None
        self._fisher_exponent = math.frexp(largest)[1]
        self._power = power

    def delta(self, stack: Stack, stride: int = 1) -> Tensor:
        """(m, r, ceil(f / stride)) float32 copy of every `stride`-th feature."""
        return self.read(self._delta, stack, stride)

    def weight(self, stack: Stack, stride: int = 1) -> Tensor:
        """Weight of each squared error, above 0: (m, r, ceil(f / stride)) float32."""
        if self._fisher is None:
            return torch.ones(len(stack.tensors), stack.r, -(-stack.f // stride), device="cpu")
        weight = self._scaled(self._fisher, stack, stride, self._fisher_exponent)
        weight = _power(weight, self._power)
        return weight.add_(weight.mean(dim=(1, 2), keepdim=True).mul_(_FLOOR).add_(_LEAST))

    def read(self, state: Mapping[str, Tensor], stack: Stack, stride: int = 1) -> Tensor:
        """A state dict in the scale of the update: (m, r, ceil(f / stride)) float32 copy."""
        return self._scaled(state, stack, stride, self.exponent)

    def _scaled(self, state: Mapping[str, Tensor], stack: Stack, stride: int, exponent: int) -> Tensor:
        rows, width = (stack.f, stack.r) if stack.tall else (stack.r, stack.f)
        parts = []
        for i in stack.tensors:
            tensor = state[self.schema.tensors[i].name].detach().reshape(rows, width)
            part = tensor[::stride] if stack.tall else tensor[:, ::stride]
            parts.append(part.to(device="cpu", dtype=torch.float32))
        stacked = torch.stack(parts)
        # 2^-exponent alone may leave the range of float32
        steps = (-exponent,) if abs(exponent) <= 100 else (-(exponent // 2), exponent // 2 - exponent)
        for step in steps:
            stacked.mul_(math.ldexp(1.0, step))
        return stacked.transpose(1, 2) if stack.tall else stacked


def _power(weight: Tensor, power: float) -> Tensor:
    """weight^power for one of POWERS, by square roots, which are the same on every machine. Overwrites weight."""
    if power == 1.0:
        return weight
    root = weight.sqrt_()
    if power == 0.5:
        return root
    if power == 0.75:
        return root.mul_(root.sqrt())
    quarter = root.sqrt_()
    return quarter if power == 0.25 else quarter.mul_(quarter.sqrt())
