"""Who takes part when: drawn once from the seed, before any method runs, so that all methods meet the same clients."""

from dataclasses import dataclass

import numpy as np

from fedfstq_hf.errors import ConfigError

_PLAN_STREAM = 0x21A7


@dataclass(frozen=True)
class RoundPlan:
    """Round `round` (counted from 1): who was sampled, and whose update arrives. Client indices, ascending."""

    round: int
    sampled: tuple[int, ...]
    survivors: tuple[int, ...]

    @property
    def num_dropped(self) -> int:
        """Number of sampled clients whose update never arrives."""
        return len(self.sampled) - len(self.survivors)


def make_plan(num_clients: int, clients_per_round: int, rounds: int, dropout: float, seed: int) -> list[RoundPlan]:
    """Draw `rounds` rounds of `clients_per_round` out of `num_clients`, each member dropping out with `dropout`.

    A round never loses everybody: where all would drop out, the one with the largest draw stays. Round `t` depends
    on the seed and `t` alone, so a longer run begins like a shorter one.
    """
    if not 1 <= clients_per_round <= num_clients:
        raise ConfigError(f"clients_per_round must lie in [1, clients = {num_clients}], got {clients_per_round}")
    if rounds < 1:
        raise ConfigError(f"rounds must be at least 1, got {rounds}")
    if not 0 <= dropout < 1:
        raise ConfigError(f"dropout must lie in [0, 1), got {dropout}")
    plans = []
    for number in range(1, rounds + 1):
        rng = np.random.default_rng([_PLAN_STREAM, seed, number])
        sampled = np.sort(rng.choice(num_clients, size=clients_per_round, replace=False))
        draws = rng.random(clients_per_round)
        stays = draws >= dropout
        if not stays.any():
            stays[np.argmax(draws)] = True
        plans.append(RoundPlan(number, tuple(int(k) for k in sampled), tuple(int(k) for k in sampled[stays])))
    return plans
