"""An adapter's matrices as one packed message: the equal forms that can be coded, from which start, and refinement.

The same product B A has many factors. Coded whole, the pair is first balanced (trained.py), which stores A's random
part too, but lets weak components go. Coded as a change from a known start, A's random part is free, but the factors
have to stay as they are. Which is better at the same size, the caller decides.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from fedfstq_hf.codec import Encoded, Schema, get_codec, message
from fedfstq_hf.codec.uniform.quantizer import Fit, fit
from fedfstq_hf.errors import AdapterMismatchError, BudgetError
from fedfstq_hf.federation import adapter_file
from fedfstq_hf.sharing.calibration import Imitation, PairWeights, matrices
from fedfstq_hf.sharing.trained import Pair

DEFAULT_CODEC = "uniform"
_SENDER = "shared"
_ROUNDS = 3  # weights are taken from the values, then from what was left of them


@dataclass(frozen=True)
class Form:
    """Factors of an adapter, to be coded as a change from a start; seeded: one that is drawn from a seed, not zeros."""

    target: Mapping[str, Tensor]
    start: Mapping[str, Tensor]
    seeded: bool

    def change(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What has to be coded so that a reader gets `state`."""
        return {name: state[name].float() - start for name, start in self.start.items()}

    def reached(self, change: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Inverse of `change`."""
        return {name: change[name] + start for name, start in self.start.items()}


@dataclass(frozen=True)
class Coded:
    """A packed adapter: the message, what a reader gets from it, and how it came about.

    error: weighted squared error of the products, as a share of the products themselves. fisher: of every coordinate.
    """

    message: bytes
    state: dict[str, Tensor]
    form: Form
    error: float
    fisher: Mapping[str, Tensor]


class Coder:
    """Packs the matrices of `state`, and no others, into messages of at most `max_bytes`.

    Args:
        weights: of every pair.
        num_examples: calibration examples behind the weights, for the message's header.

    Raises:
        ConfigError: there is no such codec.
    """

    def __init__(
        self,
        state: Mapping[str, Tensor],
        pairs: Sequence[Pair],
        weights: Sequence[PairWeights],
        max_bytes: int,
        *,
        codec: str = DEFAULT_CODEC,
        num_examples: int = 0,
    ) -> None:
        self._state, self._pairs, self._weights, self._max_bytes = state, pairs, weights, max_bytes
        self._name, self._codec, self._num_examples = codec, get_codec(codec), num_examples
        self._total = sum(_error(state, None, pair, w) for pair, w in zip(pairs, weights, strict=True)) or 1.0

    def forms(self, starts: Sequence[Mapping[str, Tensor]]) -> list[Form]:
        """One for each start: zeros, and perhaps a seeded one after it."""
        forms = []
        for number, start in enumerate(starts):
            whole = self._name == DEFAULT_CODEC and number == 0
            target = balanced(self._state, self._pairs, self._weights) if whole else self._state
            forms.append(Form(target, start, number > 0))
        return forms

    def room(self, form: Form) -> int:
        """Bytes of payload in a message.

        Raises:
            BudgetError: not even the header fits.
        """
        plan = self._header(form, {})
        room = self._max_bytes - message.overhead(plan, self._max_bytes)
        if room < 1:
            raise BudgetError(
                f"The budget leaves {self._max_bytes} bytes for the message; its header alone takes "
                f"{message.overhead(plan, self._max_bytes)}. Give a larger budget."
            )
        return room

    def code(self, form: Form) -> Coded:
        """The message that comes closest to the products.

        Raises:
            BudgetError: not even the header fits.
            NonFiniteError: the state holds NaN or infinity.
        """
        room = self.room(form)
        seen, tried = form.target, []
        for _ in range(_ROUNDS):
            fisher = _fisher(seen, self._pairs, self._weights)
            encoded = self._codec.encode(form.change(form.target), fisher, max_bytes=room)
            tried.append(self.pack(form, encoded, fisher))
            seen = tried[-1].state
        return min(tried, key=lambda coded: coded.error)

    def pack(self, form: Form, encoded: Encoded, fisher: Mapping[str, Tensor]) -> Coded:
        """An encoded change as a message, and what it amounts to."""
        schema = Schema.from_state_dict(form.start)
        state = form.reached(schema.unflatten(encoded.reconstruction.to_dense()))
        pairs = zip(self._pairs, self._weights, strict=True)
        error = sum(_error(self._state, state, pair, w) for pair, w in pairs) / self._total
        return Coded(message.pack(self._header(form, encoded.params), encoded.payload), state, form, error, fisher)

    def _header(self, form: Form, params: Mapping[str, Any]) -> message.Header:
        schema = Schema.from_state_dict(form.start)
        base = state_sha256(form.start)
        return message.Header(0, _SENDER, self._num_examples, base, schema.fingerprint, self._name, dict(params))


def balanced(state: Mapping[str, Tensor], pairs: Sequence[Pair], weights: Sequence[PairWeights]) -> dict[str, Tensor]:
    """The state with every pair balanced, float32, names and shapes as they were."""
    result = dict(state)
    for pair, weight in zip(pairs, weights, strict=True):
        a, b = balance(*matrices(state, pair), weight)
        result[pair.a] = a.float().view(state[pair.a].shape)
        result[pair.b] = b.float().view(state[pair.b].shape)
    return result


def _fisher(state: Mapping[str, Tensor], pairs: Sequence[Pair], weights: Sequence[PairWeights]) -> dict[str, Tensor]:
    fisher = {}
    for pair, weight in zip(pairs, weights, strict=True):
        of_a, of_b = coordinate_weights(*matrices(state, pair), weight)
        fisher[pair.a] = of_a.float().view(state[pair.a].shape)
        fisher[pair.b] = of_b.float().view(state[pair.b].shape)
    return fisher


def _error(
    state: Mapping[str, Tensor], decoded: Mapping[str, Tensor] | None, pair: Pair, weights: PairWeights
) -> float:
    """Weighted squared distance of a pair's product to the decoded one, or to zero."""
    a, b = matrices(state, pair)
    other_a, other_b = (a * 0, b * 0) if decoded is None else matrices(decoded, pair)
    return product_error(a, b, other_a, other_b, weights)


def initial_state(
    shapes: Mapping[str, tuple[int, ...]], pairs: Sequence[Pair], config: Mapping[str, Any], seed: int | None
) -> dict[str, Tensor]:
    """The float32 state that a shared adapter is coded against: zeros, and with a seed PEFT's random A, drawn again.

    Relied on: the 32-bit Mersenne twister of torch's CPU generator behind `torch.rand` (24 bits a draw), and the order
    in which PEFT draws for `init_lora_weights=True`: per module, in the model's order, first the two `nn.Linear` of A
    and B as torch makes them, then A again. The arithmetic is our own, so neither PEFT's version nor the base's device
    or dtype matters when a file is read. Whether it came out the same there is checked by sha256.

    Args:
        shapes: of every coded tensor.
        pairs: in the order in which PEFT makes the modules; used with a seed only.
        config: PEFT's LoRA configuration.
        seed: what `transformers.set_seed` was given right before `get_peft_model`; None: not known.

    Raises:
        AdapterMismatchError: this configuration's start cannot be drawn again.
    """
    state = {name: torch.zeros(shape) for name, shape in shapes.items()}
    if seed is None:
        return state
    _check_seeded(pairs, config)
    generator = torch.Generator().manual_seed(seed)
    for pair in pairs:
        rank, width = shapes[pair.a]
        _skip(rank * width, generator)
        _skip(math.prod(shapes[pair.b]), generator)
        if config.get("lora_bias"):
            _skip(shapes[pair.b][0], generator)
        # what kaiming_uniform_(a=sqrt(5)) comes to, in its order of operations
        bound = math.sqrt(3.0) * (math.sqrt(2.0 / (1 + math.sqrt(5) ** 2)) / math.sqrt(width))
        drawn = torch.rand(rank * width, generator=generator).numpy().astype(np.float64)
        # one rounding at the end, as torch's kernels with fused multiply-add do; exact in float64 until then
        values = (drawn * np.float64(np.float32(2 * bound)) + np.float64(np.float32(-bound))).astype(np.float32)
        state[pair.a] = torch.from_numpy(values).view(rank, width)
    return state


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """Hex sha256 of a state as a PEFT adapter file."""
    return hashlib.sha256(adapter_file.dump(state)).hexdigest()


def _check_seeded(pairs: Sequence[Pair], config: Mapping[str, Any]) -> None:
    init = config.get("init_lora_weights", True)
    others = [pair.a for pair in pairs if not pair.a.endswith(".lora_A.weight")]
    if init is not True or others:
        reason = f"it has {others[0]}" if others else f"its init_lora_weights is {init!r}"
        raise AdapterMismatchError(
            f"init_seed was given, but this adapter's start cannot be drawn again: {reason}; expected linear layers "
            "and init_lora_weights=True. Leave init_seed out."
        )


def _skip(count: int, generator: torch.Generator) -> None:
    torch.rand(count, generator=generator)


_LEARNING_RATE = 0.01  # of Adam, in steps of the grid: gradients of a few examples are mostly noise
_BETAS = (0.9, 0.99)
_WARM_UP = 10
_REFIT = 25  # steps between looks at the budget


def refine(coder: Coder, coded: Coded, imitation: Imitation, steps: int, batch_size: int, progress: bool) -> Coded:
    """A message of the same form and budget, refined by so many steps; codec `uniform` only.

    A message's error is not what its adapter loses: some errors in the product cancel in the predictions, others do
    not. Each step rounds the values, takes the gradient of the loss plus the divergence from the trained adapter's
    predictions at the rounded ones, and moves the unrounded ones by it (straight-through estimation), in units of the
    grid's steps. The grid stays where it was; the price of a bit is found anew now and then, so that the budget is met.
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
