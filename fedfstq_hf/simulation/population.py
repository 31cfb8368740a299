"""A simulation's clients: who holds which examples, and who takes part when.

Both are drawn once from the seed, before any method runs, so that all methods meet the same clients. A partition (by
Dirichlet draws over topics, at random, or as the data says) is one ascending list of example indices per client; every
example is in exactly one of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedfstq_hf.errors import ConfigError, DataError

_PARTITION_STREAM = 0x3A27


def dirichlet_partition(
    topics: Sequence[str], num_clients: int, alpha: float, seed: int, min_size: int = 1
) -> list[list[int]]:
    """Split each topic over the clients in proportions drawn from Dirichlet(alpha, ..., alpha).

    Args:
        topics: the topic of each example.
        num_clients: number of shards.
        alpha: concentration; small is skewed (0.1: a client sees one or two topics), large approaches an even split.
        seed: of all draws.
        min_size: each shard holds at least so many examples. A shard that the draw left shorter is topped up from the
            shard that is largest at that moment, out of that shard's commonest topic. (Drawing again instead would
            hardly ever end at alpha = 0.1 and 100 clients, and would bias the draw all the same.)
    """
    if not 0 < alpha < np.inf:
        raise ConfigError(f"alpha must be a number above 0, got {alpha}; for an even split use partition: iid")
    _check_sizes(len(topics), num_clients, min_size)
    rng = np.random.default_rng([_PARTITION_STREAM, seed])
    members: dict[str, list[int]] = {}
    for index, topic in enumerate(topics):
        members.setdefault(topic, []).append(index)
    shards: list[list[int]] = [[] for _ in range(num_clients)]
    for topic in sorted(members):
        shares = rng.dirichlet(np.full(num_clients, alpha))
        shuffled = rng.permutation(np.asarray(members[topic]))
        counts = _apportion(shares, len(shuffled))
        for shard, part in zip(shards, np.split(shuffled, np.cumsum(counts)[:-1]), strict=True):
            shard.extend(part.tolist())
    _top_up(shards, topics, min_size)
    return [sorted(shard) for shard in shards]


def iid_partition(num_examples: int, num_clients: int, seed: int, min_size: int = 1) -> list[list[int]]:
    """Deal the examples out at random, shard sizes differing by at most one."""
    _check_sizes(num_examples, num_clients, min_size)
    rng = np.random.default_rng([_PARTITION_STREAM, seed])
    parts = np.array_split(rng.permutation(num_examples), num_clients)
    return [sorted(part.tolist()) for part in parts]


def natural_partition(owners: Sequence[str], num_clients: int) -> list[list[int]]:
    """Keep the data's own owners (a hospital, a writer) together: one shard each, in the order of their names.

    With more owners than clients, whole owners share a shard (largest owner first, into the smallest shard); with
    fewer, there is nothing to give the others and a `DataError` says so.
    """
    members: dict[str, list[int]] = {}
    for index, owner in enumerate(owners):
        members.setdefault(owner, []).append(index)
    if len(members) < num_clients:
        raise DataError(
            f"the data name {len(members)} owners, but federation.clients is {num_clients}; "
            f"type --clients {len(members)} or --federation.partition dirichlet"
        )
    if len(members) == num_clients:
        return [members[owner] for owner in sorted(members)]
    shards: list[list[int]] = [[] for _ in range(num_clients)]
    for owner in sorted(members, key=lambda owner: (-len(members[owner]), owner)):
        min(shards, key=len).extend(members[owner])
    return [sorted(shard) for shard in shards]


def make_shards(
    examples: Sequence[Mapping[str, Any]],
    num_clients: int,
    *,
    partition: str,
    alpha: float,
    seed: int,
    min_size: int = 1,
) -> list[list[int]]:
    """Split `examples` (of `load_workload(...).train`) by the rule called `partition`: dirichlet, iid or natural."""
    if partition == "dirichlet":
        return dirichlet_partition([example["topic"] for example in examples], num_clients, alpha, seed, min_size)
    if partition == "iid":
        return iid_partition(len(examples), num_clients, seed, min_size)
    if partition == "natural":
        missing = next((index for index, example in enumerate(examples) if "client" not in example), None)
        if missing is not None:
            raise DataError(
                f"partition: natural needs the owner of each example, and example {missing} has none; "
                "type --data.client_column COLUMN, the one that names the client"
            )
        return natural_partition([example["client"] for example in examples], num_clients)
    raise ConfigError(f"partition must be dirichlet, iid or natural, got {partition!r}")


def _check_sizes(num_examples: int, num_clients: int, min_size: int) -> None:
    if num_clients < 1:
        raise ConfigError(f"clients must be at least 1, got {num_clients}")
    if min_size < 1:
        raise ConfigError(f"min_examples must be at least 1, got {min_size}: an empty shard cannot be trained on")
    if num_examples < num_clients * min_size:
        raise DataError(
            f"{num_examples} training examples cannot give each of {num_clients} clients at least {min_size}; "
            f"type --clients {max(num_examples // min_size, 1)} or load more (--data.train_limit)"
        )


def _apportion(shares: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers in the proportion of `shares` (K,) that add up to `total`, by largest remainder."""
    exact = shares * total
    counts: np.ndarray = np.floor(exact).astype(np.int64)
    order = np.argsort(counts - exact, kind="stable")
    counts[order[: total - int(counts.sum())]] += 1
    return counts


def _top_up(shards: list[list[int]], topics: Sequence[str], min_size: int) -> None:
    for shard in shards:
        while len(shard) < min_size:
            donor = max(shards, key=len)
            held: dict[str, list[int]] = {}
            for index in donor:
                held.setdefault(topics[index], []).append(index)
            commonest = max(sorted(held), key=lambda topic: len(held[topic]))
            moved = held[commonest][-1]
            donor.remove(moved)
            shard.append(moved)


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
