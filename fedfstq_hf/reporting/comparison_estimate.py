"""A figure over seeds: mean, sample standard deviation, and in how many seeds it is known."""

from collections.abc import Iterable
from dataclasses import dataclass

from fedfstq_hf.reporting.summary import mean_of, spread_of


@dataclass(frozen=True)
class Estimate:
    """A figure over `count` seeds, `known` of which have it.

    `mean` is None where a seed lacks it; `spread` (sample standard deviation) is None with one seed too.
    """

    mean: float | None
    spread: float | None
    known: int
    count: int


def estimate(values: Iterable[float | None]) -> Estimate:
    """The estimate over one value per seed."""
    values = list(values)
    known = [value for value in values if value is not None]
    if not values or len(known) < len(values):
        return Estimate(None, None, len(known), len(values))
    return Estimate(mean_of(known), spread_of(known), len(known), len(values))
