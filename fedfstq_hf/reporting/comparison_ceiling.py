"""The time that a message of zero bytes would leave: how much of a run's clock compression cannot touch.

Rows hold what each client downloaded and computed, so a round without uplink is computed as the round itself was. Rows
of earlier versions have a round's totals and means only: where all clients have one rate and send messages of one size,
sending is taken off exactly; where rates differ, the clients' mean compute is a lower bound on the round.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

from fedfstq_hf.reporting.summary import Row
from fedfstq_hf.simulation.network import LinkProfile, draw_rates, round_seconds


def is_exact(rows: Sequence[Row], link: LinkProfile) -> bool:
    """Whether `seconds_without_uplink` is no mere bound."""
    return has_one_rate(link) or knows_clients(rows, link)


def knows_clients(rows: Sequence[Row], link: LinkProfile) -> bool:
    """Whether all rows after round 0 hold what a round of each client took."""
    return all(_knows_clients(row, link) for row in rows[1:])


def _knows_clients(row: Row, link: LinkProfile) -> bool:
    # Rates that stand for a ratio depend on the adapter's size, which rows do not hold; without downlink none is used.
    return "clients" in row and (link.upload_ratio is None or math.isinf(link.downlink_ratio))


def waited_for(row: Row) -> list[int]:
    """Clients without which the round could not end: not those whose link carried no preview, only a refinement."""
    if "client_refinement_bytes" not in row:
        return list(row["clients"])
    return [client for client, sent in zip(row["clients"], row["client_air_bytes"], strict=True) if sent]


def has_one_rate(link: LinkProfile) -> bool:
    """Whether every client has the same rate, so that `seconds_without_uplink` is no mere bound."""
    return not link.spread and not link.tail_fraction


def seconds_without_uplink(rows: Sequence[Row], link: LinkProfile, num_clients: int, clients_per_round: int) -> float:
    """Seconds on `link` from the first of `rows` (round 0) to the last, had every message weighed zero bytes.

    Where `is_exact` says no, a lower bound: server time plus mean compute, round by round.
    """
    total = 0.0
    for before, row in pairwise(rows):
        if _knows_clients(row, link):
            clients = row["clients"]
            total += round_seconds(
                link,
                draw_rates(link, num_clients, row["seed"]),
                uplink_bytes=dict.fromkeys(waited_for(row), 0),
                downlink_bytes=dict(zip(clients, row["client_downlink_bytes"], strict=True)),
                compute_seconds=dict(zip(clients, row["client_compute_seconds"], strict=True)),
            )
        elif has_one_rate(link):
            sent = 8 * row["uplink_bytes"] / (clients_per_round - row["num_dropped"])
            total += row["seconds"][link.name] - before["seconds"][link.name] - sent / (link.uplink_mbps * 1e6)
        else:
            compute = row["compute_seconds"] if link.compute_seconds is None else link.compute_seconds
            total += link.server_seconds + compute
    return total
