"""The time that a message of zero bytes would leave: how much of a run's clock compression cannot touch.

A row has a round's seconds, its uplink bytes in all and its mean compute, but no client's own share. Where all clients
have one rate and send messages of one size, sending takes each of them equally long and is taken off exactly. Where
rates differ, who the slowest client would be without it is not in the rows; its clients' mean compute is a lower bound
on the round that is.
"""

from collections.abc import Sequence
from itertools import pairwise

from fedfstq_hf.reporting.summary import Row
from fedfstq_hf.simulation.network import LinkProfile


def has_one_rate(link: LinkProfile) -> bool:
    """Whether every client has the same rate, so that `seconds_without_uplink` is no mere bound."""
    return not link.spread and not link.tail_fraction


def seconds_without_uplink(rows: Sequence[Row], link: LinkProfile, clients_per_round: int) -> float:
    """Seconds on `link` from the first of `rows` (round 0) to the last, had every message weighed zero bytes.

    On a link where clients differ it is a lower bound: server time plus mean compute, round by round.
    """
    total = 0.0
    for before, row in pairwise(rows):
        if has_one_rate(link):
            sent = 8 * row["uplink_bytes"] / (clients_per_round - row["num_dropped"])
            total += row["seconds"][link.name] - before["seconds"][link.name] - sent / (link.uplink_mbps * 1e6)
        else:
            compute = row["compute_seconds"] if link.compute_seconds is None else link.compute_seconds
            total += link.server_seconds + compute
    return total
