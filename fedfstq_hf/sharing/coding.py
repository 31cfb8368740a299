"""An adapter's matrices as one packed message: which of several equal forms to code, and with which weights.

The same product B A has many factors. Coded whole, the pair is first balanced (pairs.py), which stores A's random part
too, but lets weak components go. Coded as a change from a known start, A's random part is free, but the factors
have to stay as they are. What comes closer to the product at the same size is taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from fedfstq_hf.codec import Schema, get_codec, message
from fedfstq_hf.errors import BudgetError
from fedfstq_hf.sharing.initial import state_sha256
from fedfstq_hf.sharing.pairs import Pair, PairWeights, balance, coordinate_weights, matrices, product_error

DEFAULT_CODEC = "uniform"
_SENDER = "shared"
_ROUNDS = 3  # weights are taken from the values, then from what was left of them


@dataclass(frozen=True)
class Coded:
    """A packed adapter: the message, what a reader gets from it, whether it needs the seed, and its relative error.

    error: weighted squared error of the products, as a share of the products themselves.
    """

    message: bytes
    state: dict[str, Tensor]
    seeded: bool
    error: float


def code(
    state: Mapping[str, Tensor],
    pairs: Sequence[Pair],
    weights: Sequence[PairWeights],
    references: Sequence[Mapping[str, Tensor]],
    max_bytes: int,
    *,
    codec: str = DEFAULT_CODEC,
    num_examples: int = 0,
) -> Coded:
    """The best message of at most `max_bytes` for the matrices of `state`.

    Args:
        state: the matrices of all pairs, and no others.
        weights: of every pair.
        references: what may be coded against: zeros, and perhaps a seeded start after it.
        num_examples: calibration examples behind the weights, for the message's header.

    Raises:
        BudgetError: not even the header fits.
        NonFiniteError: the state holds NaN or infinity.
        ConfigError: there is no such codec.
    """
    schema = Schema.from_state_dict(references[0])
    coder = get_codec(codec)
    total = sum(_error(state, None, pair, w) for pair, w in zip(pairs, weights, strict=True)) or 1.0
    best: Coded | None = None
    for number, reference in enumerate(references):
        plan = message.Header(0, _SENDER, num_examples, state_sha256(reference), schema.fingerprint, codec)
        room = max_bytes - message.overhead(plan, max_bytes)
        if room < 1:
            raise BudgetError(
                f"The budget leaves {max_bytes} bytes for the message; its header alone takes "
                f"{message.overhead(plan, max_bytes)}. Give a larger budget."
            )
        targets = [state] if number or codec != DEFAULT_CODEC else [balanced(state, pairs, weights)]
        for target in targets:
            seen: Mapping[str, Tensor] = target
            delta = {name: target[name].float() - reference[name] for name in reference}
            for _ in range(_ROUNDS):
                encoded = coder.encode(delta, _fisher(seen, pairs, weights), max_bytes=room)
                decoded = schema.unflatten(encoded.reconstruction.to_dense() + schema.flatten(reference))
                error = sum(_error(state, decoded, p, w) for p, w in zip(pairs, weights, strict=True)) / total
                if best is None or error < best.error:
                    header = message.Header(
                        0, _SENDER, num_examples, plan.base, schema.fingerprint, codec, encoded.params
                    )
                    best = Coded(message.pack(header, encoded.payload), decoded, number > 0, error)
                seen = decoded
    if best is None:
        raise BudgetError("There is nothing to code against; expected at least one reference.")
    return best


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
