"""An adapter's matrices as one packed message: the equal forms that can be coded, and with which weights.

The same product B A has many factors. Coded whole, the pair is first balanced (pairs.py), which stores A's random part
too, but lets weak components go. Coded as a change from a known start, A's random part is free, but the factors
have to stay as they are. Which is better at the same size, the caller decides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fedfstq_hf.codec import Encoded, Schema, get_codec, message
from fedfstq_hf.errors import BudgetError
from fedfstq_hf.sharing.initial import state_sha256
from fedfstq_hf.sharing.pairs import Pair, PairWeights, balance, coordinate_weights, matrices, product_error

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
