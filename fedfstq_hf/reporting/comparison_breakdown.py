"""Where a round's time goes, and its energy at other transmit powers; computed from the rows afterwards."""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from statistics import fmean

from fedfstq_hf.recipe.schema import Recipe
from fedfstq_hf.reporting.comparison_ceiling import waited_for
from fedfstq_hf.reporting.summary import Row
from fedfstq_hf.simulation.network import LinkProfile, draw_rates

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
