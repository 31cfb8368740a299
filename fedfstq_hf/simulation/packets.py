"""What a lossy uplink does to a round's messages: packets, retransmissions, messages lost for good.

A message is cut into packets of 1500 bytes. Each transmission of a packet is lost with the same probability; the link
layer repeats a lost one a few times, then gives the packet up, and with it the message. A round of which no message
arrives is sent again. All draws are a function of seed, round, client, attempt and packet: methods that send as many
packets meet the same losses, and a longer message meets those of a shorter one first.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fedfstq_hf.errors import FedFSTQError

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
    """Send a round's messages of `sizes` bytes by client index.

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
