"""Training through the rounding: values move until what a reader gets predicts as well as the trained adapter does.

A message's error is not what its adapter loses: some errors in the product cancel in the predictions, others do not.
Each step rounds the values, takes the gradient of the loss plus the divergence from the trained adapter's predictions
(imitation.py) at the rounded ones, and moves the unrounded ones by it (straight-through estimation), in units of the
grid's steps. The grid stays where it was; the price of a bit is found anew now and then, so that the budget is met to
the end.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping

import torch
from torch import Tensor
from tqdm.auto import tqdm

from fedfstq_hf.codec.uniform.rounding import Fit, fit
from fedfstq_hf.sharing.coding import Coded, Coder
from fedfstq_hf.sharing.imitation import Imitation

_LEARNING_RATE = 0.01  # of Adam, in steps of the grid: gradients of a few examples are mostly noise
_BETAS = (0.9, 0.99)
_WARM_UP = 10
_REFIT = 25  # steps between looks at the budget


def refine(coder: Coder, coded: Coded, imitation: Imitation, steps: int, batch_size: int, progress: bool) -> Coded:
    """A message of the same form and budget, refined by so many steps; codec `uniform` only.

    The same arguments give the same message on the same machine. It is not compared with the one that it began with.
    """
    form, room = coded.form, coder.room(coded.form)
    values = form.change(form.target)
    fitted = fit(values, coded.fisher, room)
    units = fitted.rounding.steps()
    first, second = _zeros(values), _zeros(values)
    order: list[int] = []
    shuffle = random.Random(0)
    for step in tqdm(range(1, steps + 1), desc="refining", unit="step", disable=not progress, dynamic_ncols=True):
        if step > 1 and step % _REFIT == 1:
            fitted = fit(values, coded.fisher, room, held=fitted.rounding)
        while len(order) < batch_size:
            order = shuffle.sample(range(len(imitation)), len(imitation)) + order
        picks = [order.pop() for _ in range(batch_size)]
        gradients = imitation.gradient(form.reached(fitted.rounding(values)), picks)
        rate = _LEARNING_RATE * min(1.0, step / _WARM_UP) * (1 + math.cos(math.pi * step / steps)) / 2
        for name, gradient in gradients.items():
            scaled = gradient * units[name]
            first[name].lerp_(scaled, 1 - _BETAS[0])
            second[name].lerp_(scaled.square_(), 1 - _BETAS[1])
            spread = (second[name] / (1 - _BETAS[1] ** step)).sqrt_().clamp_min_(torch.finfo(torch.float32).tiny)
            move = first[name] / (1 - _BETAS[0] ** step) / spread
            values[name] = values[name] - rate * units[name] * move
    last: Fit = fit(values, coded.fisher, room, held=fitted.rounding)
    return coder.pack(form, last.encoded, coded.fisher)


def _zeros(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(value) for name, value in values.items()}
