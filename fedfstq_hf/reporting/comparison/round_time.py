"""A run's clock without uplink, where a round's time goes, and its energy at other powers; computed from the rows."""

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean

from fedfstq_hf.recipe.network import LinkProfile, draw_rates, round_cost
from fedfstq_hf.reporting.comparison.summary import Row


def waited_for(row: Row) -> list[int]:
    """Clients without which the round could not end: not those whose link carried no preview, only a refinement."""
    if "client_refinement_bytes" not in row:
        return list(row["clients"])
    return [client for client, sent in zip(row["clients"], row["client_air_bytes"], strict=True) if sent]


def seconds_without_uplink(rows: Sequence[Row], link: LinkProfile, num_clients: int) -> float | None:
    """Seconds on `link` from the first of `rows` (round 0) to the last, had every message weighed zero bytes.

    Each round is computed as the round itself was. None where it cannot be: rates that stand for a ratio depend on the
    adapter's size, which rows do not hold; where downloads take no time, none is used.
    """
    if _lacks_rates(link):
        return None
    return sum(
        round_cost(
            link,
            draw_rates(link, num_clients, row["seed"]),
            uplink_bytes=dict.fromkeys(waited_for(row), 0),
            downlink_bytes=dict(zip(row["clients"], row["client_downlink_bytes"], strict=True)),
            compute_seconds=dict(zip(row["clients"], row["client_compute_seconds"], strict=True)),
        ).seconds
        for row in rows[1:]
    )


def _lacks_rates(link: LinkProfile) -> bool:
    return link.upload_ratio is not None and not math.isinf(link.downlink_ratio)


TRANSMIT_WATTS = (0.1, 0.5, 1.0, 2.0, 5.0)
"""The sweep of P_tx."""

Parts = tuple[float, float, float, float]
"""Seconds of a round: local compute, uplink, downlink, server."""


def mean_parts(series: Sequence[Sequence[Row]], link: LinkProfile, num_clients: int) -> Parts | None:
    """The parts of a round as its slowest client has them, mean over rounds and seeds; None where rates are unknown."""
    parts = [_parts(before, row, link, num_clients) for rows in series for before, row in pairwise(rows)]
    if not parts or _lacks_rates(link):
        return None
    compute, uplink, downlink, server = (fmean(column) for column in zip(*parts, strict=True))
    return compute, uplink, downlink, server


def _parts(before: Row, row: Row, link: LinkProfile, num_clients: int) -> Parts:
    if link.upload_ratio is not None and link.compute_seconds is not None:
        # Who is slowest only its message and rate decide, and the rates are not known here: what is left is uplink.
        rest = row["seconds"][link.name] - before["seconds"][link.name] - link.server_seconds - link.compute_seconds
        return link.compute_seconds, rest, 0.0, link.server_seconds
    rates, waited = draw_rates(link, num_clients, row["seed"]), waited_for(row)
    names = ("clients", "client_compute_seconds", "client_air_bytes", "client_downlink_bytes")
    each = [
        (
            computed if link.compute_seconds is None else link.compute_seconds,
            8 * sent / float(rates.uplink[client]),
            8 * fetched / float(rates.downlink[client]),
        )
        for client, computed, sent, fetched in zip(*(row[name] for name in names), strict=True)
        if client in waited
    ]
    return (*max(each, key=sum), link.server_seconds)


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
