"""What a method needed to a target, seed by seed beside the reference: bytes, seconds, and the floor of the seconds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedfstq_hf.recipe.schema import Recipe
from fedfstq_hf.reporting.comparison_ceiling import seconds_without_uplink
from fedfstq_hf.reporting.comparison_estimate import Estimate, estimate
from fedfstq_hf.reporting.summary import Row, TargetRule, quotient, reached_at, to_target

Series = Mapping[int, Sequence[Row]]
"""Rows by seed, from round 0 on."""


@dataclass(frozen=True)
class Reached:
    """What a method needed to one target. Ratios are the reference's figure over the method's, mean over seeds.

    Attributes:
        uplink: bytes of all clients.
        seconds: on each link, simulated.
        floor: the same with zero uplink bytes; a lower bound on links whose clients differ.
        ceiling: reference's seconds over the floor: what no compression could exceed in as many rounds.
        share: of the ceiling that was reached: the floor over the method's own seconds.
        reference_share: the reference's floor over the method's seconds: what is reached of what messages of zero
            bytes give in as many rounds as the reference needs. Above 1 for a method that needs fewer.
    """

    uplink: Estimate
    uplink_ratio: Estimate
    seconds: dict[str, Estimate]
    seconds_ratio: dict[str, Estimate]
    floor: dict[str, Estimate]
    ceiling: dict[str, Estimate]
    share: dict[str, Estimate]
    reference_share: dict[str, Estimate]


def reach(series: Series, reference: Series, targets: Mapping[int, float], rule: TargetRule, recipe: Recipe) -> Reached:
    """Figures to the targets of the seeds in `targets`, over those that `series` has."""
    higher = recipe.evaluation.higher_is_better
    seeds = [seed for seed in series if seed in targets]
    ours = {seed: to_target(series[seed], targets[seed], rule, higher_is_better=higher) for seed in seeds}
    theirs = {seed: to_target(reference[seed], targets[seed], rule, higher_is_better=higher) for seed in seeds}
    links = [link.name for link in recipe.links]

    def floors_of(rows: Series) -> dict[str, dict[int, float | None]]:
        return {link: {seed: _floor(rows[seed], targets[seed], rule, recipe, link) for seed in seeds} for link in links}

    floors, their_floors = floors_of(series), floors_of(reference)

    def seconds(tree: Mapping[int, Mapping[str, Mapping[str, float | None]]], seed: int, link: str) -> float | None:
        return tree[seed]["seconds_to_target"][link]

    return Reached(
        uplink=estimate(ours[seed]["uplink_bytes_to_target"] for seed in seeds),
        uplink_ratio=estimate(
            quotient(theirs[seed]["uplink_bytes_to_target"], ours[seed]["uplink_bytes_to_target"]) for seed in seeds
        ),
        seconds={link: estimate(seconds(ours, seed, link) for seed in seeds) for link in links},
        seconds_ratio={
            link: estimate(quotient(seconds(theirs, seed, link), seconds(ours, seed, link)) for seed in seeds)
            for link in links
        },
        floor={link: estimate(floors[link].values()) for link in links},
        ceiling={
            link: estimate(quotient(seconds(theirs, seed, link), floors[link][seed]) for seed in seeds)
            for link in links
        },
        share={
            link: estimate(quotient(floors[link][seed], seconds(ours, seed, link)) for seed in seeds) for link in links
        },
        reference_share={
            link: estimate(quotient(their_floors[link][seed], seconds(ours, seed, link)) for seed in seeds)
            for link in links
        },
    )


def _floor(rows: Sequence[Row], target: float, rule: TargetRule, recipe: Recipe, name: str) -> float | None:
    hit = reached_at(rows, target, rule, higher_is_better=recipe.evaluation.higher_is_better)
    if hit is None:
        return None
    link = next(link for link in recipe.links if link.name == name)
    federation = recipe.federation
    return seconds_without_uplink(rows[: hit["round"] + 1], link, federation.clients, federation.clients_per_round)
