"""Where a round's time goes, and its energy at other transmit powers; computed from the rows afterwards."""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from statistics import fmean

from fedfstq_hf.recipe.schema import Recipe
from fedfstq_hf.reporting.comparison.summary import Row
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


TRANSMIT_WATTS = (0.1, 0.5, 1.0, 2.0, 5.0)
"""The sweep of P_tx."""

Parts = tuple[float, float, float, float]
"""Seconds of a round: local compute, uplink, downlink, server."""


def mean_parts(series: Sequence[Sequence[Row]], link: LinkProfile, recipe: Recipe) -> Parts | None:
    """The parts of a round as its slowest client has them, mean over rounds and seeds; None where rows do not say."""
    parts = [part for rows in series for part in _parts(rows, link, recipe.federation.clients)]
    if not parts or any(part is None for part in parts):
        return None
    compute, uplink, downlink, server = (fmean(column) for column in zip(*filter(None, parts), strict=True))
    return compute, uplink, downlink, server


def _parts(rows: Sequence[Row], link: LinkProfile, num_clients: int) -> Iterator[Parts | None]:
    for before, row in pairwise(rows):
        if "clients" not in row:
            yield None
        elif link.upload_ratio is not None and link.compute_seconds is not None:
            # Who is slowest only its message and rate decide, and the rates are not known here: what is left is uplink.
            seconds = row["seconds"][link.name] - before["seconds"][link.name]
            rest = seconds - link.server_seconds - link.compute_seconds
            yield (link.compute_seconds, rest, 0.0, link.server_seconds) if math.isinf(link.downlink_ratio) else None
        else:
            rates = draw_rates(link, num_clients, row["seed"])
            columns = (
                row["clients"],
                row["client_compute_seconds"],
                row["client_air_bytes"],
                row["client_downlink_bytes"],
            )
            waited = waited_for(row)
            slowest = max(
                (
                    (
                        computed if link.compute_seconds is None else link.compute_seconds,
                        8 * sent / float(rates.uplink[client]),
                        8 * fetched / float(rates.downlink[client]),
                    )
                    for client, computed, sent, fetched in zip(*columns, strict=True)
                    if client in waited
                ),
                key=sum,
            )
            yield (*slowest, link.server_seconds)


def mean_energy(series: Sequence[Sequence[Row]], link: LinkProfile, watts: float) -> float | None:
    """Joules of the mean client and round at `watts` while sending, computing as the link says."""
    joules = []
    for rows in series:
        for row in rows:
            if not row.get("energy"):
                continue
            seconds = row["compute_seconds"] if link.compute_seconds is None else link.compute_seconds
            computing = link.compute_watts * seconds
            sending = row["energy"][link.name]["mean"] - computing
            joules.append(computing + (sending * watts / link.transmit_watts if link.transmit_watts else 0.0))
    return fmean(joules) if joules and link.transmit_watts else None
