"""How a round is cut out of one long `Trainer.train()`: its data order, its schedule, its optimizer state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate import skip_first_batches
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Sampler

_OPTIMIZER = "optimizer"


class RoundSampler(Sampler[int]):
    """The examples of one client's round: as many passes as it takes, each in an order of its own.

    Args:
        num_examples: size of the client's data set.
        num_samples: indices to draw.
        seed: the order depends on it and on nothing else.
    """

    def __init__(self, num_examples: int, num_samples: int, seed: int) -> None:
        self.num_examples = num_examples
        self.num_samples = num_samples
        self.seed = seed

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed)
        left = self.num_samples
        while left > 0:
            order = torch.randperm(self.num_examples, generator=generator)[:left]
            yield from order.tolist()
            left -= len(order)


def skip_batches(loader: Any, count: int) -> Any:
    """The loader without its first `count` batches, which are not collated either."""
    return skip_first_batches(loader, count) if count else loader


def set_schedule(scheduler: Any, step: int) -> None:
    """Put a learning-rate schedule at a step of the federation, for a client that skipped rounds or repeats one.

    Schedules that look at metrics instead of steps stay as they are.
    """
    if not isinstance(scheduler, LambdaLR):
        return
    scheduler.last_epoch = step
    rates = [base * factor(step) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates


def dump_optimizer(optimizer: Any, parameters: Sequence[Tensor]) -> dict[str, Tensor]:
    """The optimizer's state per parameter, as `optimizer.INDEX.NAME`; plain numbers (a step counter) end in `#`."""
    dumped: dict[str, Tensor] = {}
    for index, parameter in enumerate(parameters):
        for name, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                dumped[f"{_OPTIMIZER}.{index}.{name}"] = value.detach().clone()
            elif isinstance(value, (int, float)):
                dtype = torch.float64 if isinstance(value, float) else None
                dumped[f"{_OPTIMIZER}.{index}.{name}#"] = torch.tensor(value, dtype=dtype)
    return dumped


def load_optimizer(optimizer: Any, parameters: Sequence[Tensor], carried: Mapping[str, Tensor]) -> None:
    """Set the optimizer's state to what `dump_optimizer` returned; without any, to a fresh one."""
    optimizer.state.clear()
    for key, value in carried.items():
        if not key.startswith(f"{_OPTIMIZER}."):
            continue
        _, index, name = key.split(".", 2)
        parameter = parameters[int(index)]
        if name.endswith("#"):
            optimizer.state[parameter][name[:-1]] = value.item()
        else:
            optimizer.state[parameter][name] = value.clone() if name == "step" else value.clone().to(parameter.device)
