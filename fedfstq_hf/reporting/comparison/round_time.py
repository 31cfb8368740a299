"""A run's clock without traffic, where a round's time goes, and its energy at other powers; computed from the rows."""

from collections.abc import Sequence
from statistics import fmean

from fedfstq_hf.recipe.network import LinkProfile, LinkRates, draw_rates
from fedfstq_hf.reporting.comparison.summary import Row


def waited_for(row: Row) -> list[int]:
    """Clients without which the round could not end: not those whose link carried no preview, only a refinement."""
    if "client_refinement_bytes" not in row:
        return list(row["clients"])
    return [client for client, sent in zip(row["clients"], row["client_air_bytes"], strict=True) if sent]


def seconds_without_traffic(rows: Sequence[Row], link: LinkProfile) -> float:
    """Seconds on `link` from the first of `rows` (round 0) to the last, had nothing weighed a byte in either direction.

    What is left is the slowest local compute of each round, and the server.
    """
    return sum(link.server_seconds + max(_compute(row, link, set(waited_for(row)))) for row in rows[1:])


def _compute(row: Row, link: LinkProfile, clients: set[int]) -> list[float]:
    if link.compute_seconds is not None:
        return [link.compute_seconds]
    pairs = zip(row["clients"], row["client_compute_seconds"], strict=True)
    return [seconds for client, seconds in pairs if client in clients]


TRANSMIT_WATTS = (0.1, 0.5, 1.0, 2.0, 5.0)
"""The sweep of P_tx."""

Parts = tuple[float, float, float, float]
"""Seconds of a round: local compute, uplink, downlink, server."""


def mean_parts(series: Sequence[Sequence[Row]], link: LinkProfile, num_clients: int) -> Parts | None:
    """The parts of a round as its slowest client has them, mean over rounds and seeds; None without any round."""
    parts = []
    for rows in series:
        profile = link.for_adapter(rows[0]["num_params"]) if link.upload_ratio is not None else link
        rates = draw_rates(profile, num_clients, rows[0]["seed"])
        parts += [_parts(row, profile, rates) for row in rows[1:]]
    if not parts:
        return None
    compute, uplink, downlink, server = (fmean(column) for column in zip(*parts, strict=True))
    return compute, uplink, downlink, server


def _parts(row: Row, link: LinkProfile, rates: LinkRates) -> Parts:
    waited = waited_for(row)
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
