"""Links as arithmetic: rates drawn from a named profile, packets that get lost, a round's seconds and joules.

Nothing sleeps. Round time is straggler-limited (paper, section III): the server waits for its slowest survivor. What a
lossy uplink does is a function of seed, round, client, attempt and packet: methods that send as many packets meet the
same losses, and a longer message meets those of a shorter one first.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from fedfstq_hf.errors import ConfigError, FedFSTQError
from fedfstq_hf.text import unknown

NOTHING: Mapping[int, Any] = MappingProxyType({})
_RATE_STREAM = 0x11A7E  # keeps the rates' random stream apart from those of the plan and the partition


@dataclass(frozen=True)
class LinkProfile:
    """A population of client links. Rates in Mbit/s (decimal), times in seconds, power in watts.

    Every client draws one uplink rate for the whole run: log-normal around `uplink_mbps`, except for a share
    `tail_fraction` of the clients, whose rate is log-uniform in `tail_mbps`. Default powers: 2 W while transmitting
    (the paper's), 4 W while computing (what its 839.2 J for 5.00 s of compute and 133.8 J for 5.85 s imply).
    """

    name: str
    uplink_mbps: float = 20.0
    """Median uplink rate of the body of the clients."""
    spread: float = 0.0
    """Standard deviation of log(rate) in the body; 0 gives every client the same rate."""
    tail_fraction: float = 0.0
    """Share of the clients on the slow tail, rounded up to whole clients."""
    tail_mbps: tuple[float, float] = (0.5, 2.0)
    """Lowest and highest uplink rate on the slow tail."""
    downlink_ratio: float = 5.0
    """Downlink rate over uplink rate of the same client; public LTE networks are this asymmetric. Infinity: downloads
    take no time, as in the paper's round time."""
    server_seconds: float = 0.0
    """T_srv: what the server adds to every round."""
    compute_seconds: float | None = None
    """Local compute per client and round; None takes the measured one."""
    upload_ratio: float | None = None
    """Sets the rates by what they mean: at the median rate an uncompressed (fp32) message takes this many times
    `compute_seconds`, whatever machine and adapter; see `for_adapter`. None takes the rates as they are given."""
    transmit_watts: float = 2.0
    compute_watts: float = 4.0

    def __post_init__(self) -> None:
        if not 0 < self.uplink_mbps < math.inf:
            raise ConfigError(f"uplink_mbps must be a number above 0, got {self.uplink_mbps!r}")
        if not self.downlink_ratio > 0:
            raise ConfigError(f"downlink_ratio must be a number above 0 or .inf, got {self.downlink_ratio!r}")
        for name in ("spread", "server_seconds", "transmit_watts", "compute_watts"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be a number of at least 0, got {getattr(self, name)!r}")
        if not 0 <= self.tail_fraction <= 1:
            raise ConfigError(f"tail_fraction must lie in [0, 1], got {self.tail_fraction!r}")
        if len(self.tail_mbps) != 2 or not 0 < self.tail_mbps[0] <= self.tail_mbps[1] < math.inf:
            raise ConfigError(f"tail_mbps must be [lowest, highest] with 0 < lowest <= highest, got {self.tail_mbps!r}")
        if self.compute_seconds is not None and not 0 <= self.compute_seconds < math.inf:
            raise ConfigError(f"compute_seconds must be a number of at least 0 or null, got {self.compute_seconds!r}")
        if self.upload_ratio is not None and not (0 < self.upload_ratio < math.inf and self.compute_seconds):
            raise ConfigError(
                f"upload_ratio must be a number above 0 beside compute_seconds above 0, got {self.upload_ratio!r} and "
                f"{self.compute_seconds!r}"
            )

    def for_adapter(self, num_params: int) -> "LinkProfile":
        """This profile with the rates that `upload_ratio` stands for at so many numbers of 32 bits.

        The tail keeps its distance from the median.
        """
        if self.upload_ratio is None or self.compute_seconds is None:
            return self
        median = 32 * num_params / (self.upload_ratio * self.compute_seconds) / 1e6
        low, high = (rate * median / self.uplink_mbps for rate in self.tail_mbps)
        return replace(self, uplink_mbps=median, tail_mbps=(low, high), upload_ratio=None)


PROFILES: dict[str, LinkProfile] = {
    profile.name: profile
    for profile in (
        # Every client alike: isolates what the payload alone costs.
        LinkProfile("lte-20mbps"),
        # A body around 10 Mbit/s and a fifth of the clients at the cell edge, 0.5-2 Mbit/s.
        LinkProfile("straggler-tail", uplink_mbps=10.0, spread=0.5, tail_fraction=0.2),
        # The same population with its rates set by the ratio of an uncompressed upload to the local compute, which is
        # the unit of time.
        *(
            LinkProfile(
                f"link-{ratio}x",
                uplink_mbps=10.0,
                spread=0.5,
                tail_fraction=0.2,
                compute_seconds=1.0,
                upload_ratio=float(ratio),
            )
            for ratio in (1, 10, 100)
        ),
    )
}


@dataclass(frozen=True)
class LinkRates:
    """Rates of clients 0..K-1 in bit/s, each array of shape (K,)."""

    uplink: np.ndarray
    downlink: np.ndarray


@dataclass(frozen=True)
class RoundCost:
    """What one round cost on one link: seconds of the round, joules as mean over its clients and of the straggler.

    `backlog`: seconds for which clients' uplinks are still busy with refinements when the round is over.
    """

    seconds: float
    straggler: int
    energy_mean: float
    energy_straggler: float
    backlog: dict[int, float] = field(default_factory=dict)


def get_link(name: str) -> LinkProfile:
    """Return the profile called `name`; an unknown name raises `ConfigError` with the nearest known one."""
    if name in PROFILES:
        return PROFILES[name]
    raise ConfigError(
        unknown("link profile", name, PROFILES)
        + " A profile of your own is written in place, e.g. {name: office, uplink_mbps: 5}."
    )


def draw_rates(profile: LinkProfile, num_clients: int, seed: int) -> LinkRates:
    """Draw the rates of `num_clients` clients, fixed for a whole run and the same for every method.

    Exactly `ceil(tail_fraction * num_clients)` clients are on the slow tail, so that no seed happens to be without one.
    A body rate is kept above the tail's highest rate.
    """
    if num_clients < 1:
        raise ConfigError(f"num_clients must be at least 1, got {num_clients}")
    rng = np.random.default_rng([_RATE_STREAM, seed])
    log_rates = math.log(profile.uplink_mbps) + profile.spread * rng.standard_normal(num_clients)
    num_slow = math.ceil(profile.tail_fraction * num_clients - 1e-9)
    low, high = profile.tail_mbps
    if num_slow:
        log_rates = np.maximum(log_rates, math.log(high))
        slow = rng.permutation(num_clients)[:num_slow]
        log_rates[slow] = rng.uniform(math.log(low), math.log(high), size=num_slow)
    uplink = np.exp(log_rates) * 1e6
    return LinkRates(uplink=uplink, downlink=uplink * profile.downlink_ratio)


def round_cost(
    profile: LinkProfile,
    rates: LinkRates,
    *,
    uplink_bytes: Mapping[int, int],
    downlink_bytes: Mapping[int, int],
    compute_seconds: Mapping[int, float],
    refinement_bytes: Mapping[int, int] = NOTHING,
    backlog: Mapping[int, float] = NOTHING,
) -> RoundCost:
    """Cost of a round for the clients that are keys of `uplink_bytes`: those whose update arrived.

    Args:
        profile: the link; its `compute_seconds`, where set, replaces the measured one.
        rates: of all clients, from `draw_rates`.
        uplink_bytes: message bytes by client index.
        downlink_bytes: bytes the client fetched before the round, by client index.
        compute_seconds: measured local seconds by client index.
        refinement_bytes: bytes that a client sends from then on, while the next round goes on, by client index; also
            of clients that are no keys of `uplink_bytes`.
        backlog: of the round before: the round is not over before those refinements are there, and a client's own goes
            before its message.

    `T = T_srv + max_k(8 down_k / R_down,k + T_comp,k + 8 up_k / R_up,k)` and, per client,
    `E_k = P_comp T_comp,k + P_tx 8 up_k / R_up,k` (energy of the receiver is not counted, as in the paper).
    """
    if not uplink_bytes:
        raise ConfigError("a round needs at least one client whose update arrived, got none")
    seconds: dict[int, float] = {}
    energy: dict[int, float] = {}
    busy: dict[int, float] = {}
    for client in {**uplink_bytes, **refinement_bytes}:
        compute = compute_seconds[client] if profile.compute_seconds is None else profile.compute_seconds
        up, following = (
            8 * sizes.get(client, 0) / float(rates.uplink[client]) for sizes in (uplink_bytes, refinement_bytes)
        )
        ready = 8 * downlink_bytes[client] / float(rates.downlink[client]) + compute
        sent = max(ready, backlog.get(client, 0.0)) + up
        if client in uplink_bytes:
            seconds[client] = sent
        busy[client] = sent + following
        energy[client] = profile.compute_watts * compute + profile.transmit_watts * (up + following)
    straggler = max(seconds, key=lambda client: (seconds[client], -client))
    total = profile.server_seconds + max(seconds[straggler], *backlog.values(), 0.0)
    return RoundCost(
        seconds=total,
        straggler=straggler,
        energy_mean=sum(energy.values()) / len(energy),
        energy_straggler=energy[straggler],
        backlog={client: busy[client] - total for client in refinement_bytes if busy[client] > total},
    )


PACKET_BYTES = 1500
_LOSS_STREAM = 0x10551
_MOST_ATTEMPTS = 1000


@dataclass(frozen=True)
class Delivery:
    """What became of a round's messages, by client index.

    Attributes:
        arrived: clients whose message came through whole, ascending.
        air_bytes: bytes of all transmissions, repeated ones and those of lost messages included.
        attempts: how often the round was sent; 1 unless every message was lost.
    """

    arrived: tuple[int, ...]
    air_bytes: dict[int, int]
    attempts: int = 1


def deliver(
    sizes: Mapping[int, int], *, loss: float, retransmissions: int, seed: int, round: int, refinements: bool = False
) -> Delivery:
    """Send a round's messages of `sizes` bytes by client index, in packets of 1500 bytes.

    The link layer repeats a lost packet a few times, then gives it up, and with it the message. A round of which no
    message arrives is sent again.

    Args:
        loss: probability that one transmission of a packet is lost, in [0, 1).
        retransmissions: how often the link layer repeats a packet before it gives it up.
        refinements: these follow the round's messages: they meet losses of their own, and are sent once.

    Raises:
        FedFSTQError: not one message came through in 1000 attempts.
    """
    if not loss or not sizes:
        return Delivery(tuple(sorted(sizes)), dict(sizes))
    air = dict.fromkeys(sizes, 0)
    for attempt in range(1, _MOST_ATTEMPTS + 1):
        arrived = []
        for client, size in sizes.items():
            rng = np.random.default_rng([_LOSS_STREAM, seed, round, client, attempt, *([1] if refinements else [])])
            sent, whole = _transmit(size, loss, retransmissions, rng)
            air[client] += sent
            if whole:
                arrived.append(client)
        if arrived or refinements:
            return Delivery(tuple(sorted(arrived)), air, attempt)
    raise FedFSTQError(
        f"Round {round}: not one of {len(sizes)} messages of up to {max(sizes.values())} bytes came through at a "
        f"packet loss of {loss:g} with {retransmissions} retransmissions in {_MOST_ATTEMPTS} attempts. Allow more by "
        "--federation.retransmissions, or lower --federation.packet_loss."
    )


def _transmit(size: int, loss: float, retransmissions: int, rng: np.random.Generator) -> tuple[int, bool]:
    """(bytes on the air, whether all packets came through); sending stops at the first packet that is given up."""
    packets = -(-size // PACKET_BYTES)
    lost = rng.random((packets, 1 + retransmissions)) < loss
    given_up = lost.all(axis=1)
    tries = np.where(given_up, 1 + retransmissions, 1 + lost.argmin(axis=1))
    if given_up.any():
        tries[int(given_up.argmax()) + 1 :] = 0
    weights = np.full(packets, PACKET_BYTES)
    weights[-1] = size - PACKET_BYTES * (packets - 1)
    return int(tries @ weights), not given_up.any()
