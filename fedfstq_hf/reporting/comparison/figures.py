"""The figures of one workload: every method against the targets that the reference's improvement sets.

Figures are means over the seeds that a method has finished; ratios pair a method with the reference seed by seed.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from fedfstq_hf.recipe.sections import Recipe
from fedfstq_hf.reporting.comparison.round_time import seconds_without_traffic
from fedfstq_hf.reporting.comparison.summary import (
    REFERENCE,
    Row,
    TargetRule,
    mean_of,
    metric_of,
    quotient,
    reached_at,
    spread_of,
    target_value,
    total_bytes,
    totals,
)
from fedfstq_hf.reporting.comparison.workloads import FREE, Method, Workload, flatten


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


Series = Mapping[int, Sequence[Row]]
"""Rows by seed, from round 0 on."""


@dataclass(frozen=True)
class Times:
    """Simulated seconds to a target on one link.

    Attributes:
        ratio: the reference's seconds over the method's.
        floor: the seconds had nothing weighed a byte, in either direction.
        ceiling: the reference's seconds over the floor: what no compression could exceed in as many rounds.
        share: of the ceiling that was reached: the floor over the method's own seconds.
        reference_share: the reference's floor over the method's seconds: what is reached of what zero bytes give in
            as many rounds as the reference needs. Above 1 for a method that needs fewer.
    """

    seconds: Estimate
    ratio: Estimate
    floor: Estimate
    ceiling: Estimate
    share: Estimate
    reference_share: Estimate


@dataclass(frozen=True)
class Reached:
    """What a method needed to one target: bytes of all clients, the reference's over the method's, times by link.

    `total` counts both directions.
    """

    uplink: Estimate
    uplink_ratio: Estimate
    total: Estimate
    total_ratio: Estimate
    times: dict[str, Times]


def reach(series: Series, reference: Series, targets: Mapping[int, float], rule: TargetRule, recipe: Recipe) -> Reached:
    """Figures to the targets of the seeds in `targets`, over those that `series` has. Ratios are means over seeds."""
    ours, theirs = (_ways(rows, series.keys() & targets.keys(), targets, rule, recipe) for rows in (series, reference))
    times = {}
    for link in recipe.links:
        own, base = ([way[-1]["seconds"][link.name] if way else None for way in ways] for ways in (ours, theirs))
        floor, base_floor = (
            [seconds_without_traffic(way, link) if way else None for way in ways] for ways in (ours, theirs)
        )
        times[link.name] = Times(
            seconds=estimate(own),
            ratio=_ratio(base, own),
            floor=estimate(floor),
            ceiling=_ratio(base, floor),
            share=_ratio(floor, own),
            reference_share=_ratio(base_floor, own),
        )
    own, base = ([way[-1]["cumulative_uplink_bytes"] if way else None for way in ways] for ways in (ours, theirs))
    both, base_both = ([total_bytes(way[-1]) if way else None for way in ways] for ways in (ours, theirs))
    return Reached(estimate(own), _ratio(base, own), estimate(both), _ratio(base_both, both), times)


def _ratio(above: Sequence[float | None], below: Sequence[float | None]) -> Estimate:
    return estimate(map(quotient, above, below))


def _ways(
    series: Series, seeds: Iterable[int], targets: Mapping[int, float], rule: TargetRule, recipe: Recipe
) -> list[Sequence[Row] | None]:
    """For each seed the rows up to the one that reaches its target; None where none does."""
    higher = recipe.evaluation.higher_is_better
    hits = {seed: reached_at(series[seed], targets[seed], rule, higher_is_better=higher) for seed in sorted(seeds)}
    return [None if hit is None else series[seed][: hit["round"] + 1] for seed, hit in hits.items()]


FRACTIONS = (0.5, 0.75, 0.9)
"""Of the reference's improvement: the loose, the middle and the tight target."""
TIGHT = FRACTIONS[-1]


@dataclass(frozen=True)
class MethodFigures:
    """One method: where it ended and what it needed to each target.

    Attributes:
        series: rows by seed that the figures are made of; see `usable`.
        finished: whether these are whole runs.
        energy: (mean client, straggler) in joules per client and round, by link; empty where the rows have none.
    """

    method: Method
    series: dict[int, list[Row]]
    finished: bool
    rounds: int
    final: Estimate
    uplink: Estimate
    downlink: Estimate
    reached: dict[float, Reached]
    energy: dict[str, tuple[float, float]]

    @property
    def label(self) -> str:
        """What the method is called in tables and plots."""
        return self.method.label


@dataclass(frozen=True)
class Comparison:
    """A workload with its figures.

    Attributes:
        reference: numerator of the ratios and whose improvement sets the targets; None where no run can give it.
        targets: metric by fraction and seed; no entry where the reference has not finished or did not improve.
        start: metric before training, over seeds.
    """

    workload: Workload
    reference: str | None
    rule: TargetRule
    targets: dict[float, dict[int, float]]
    start: Estimate
    methods: list[MethodFigures]

    @property
    def links(self) -> list[str]:
        """Names of the links, in the recipe's order."""
        return [link.name for link in self.workload.recipe.links]

    def find(self, label: str | None) -> MethodFigures | None:
        """Figures of the method called `label`."""
        return next((figures for figures in self.methods if figures.label == label), None)


def compare(workload: Workload) -> Comparison:
    """All figures of `workload`."""
    recipe = workload.recipe
    series = {label: usable(method, recipe.federation.rounds) for label, method in workload.methods.items()}
    reference = _reference(workload)
    base = series[reference] if reference else {}
    rules = {part: TargetRule(reference or REFERENCE, part, recipe.target.consecutive) for part in FRACTIONS}
    targets = {part: values for part in FRACTIONS if (values := _targets(base, rules[part], workload))}
    starts = {seed: metric_of(rows[0]) for by_seed in series.values() for seed, rows in by_seed.items()}
    methods = []
    for label, method in workload.methods.items():
        own = series[label]
        ends = [totals(rows) for rows in own.values()]
        methods.append(
            MethodFigures(
                method=method,
                series=own,
                finished=_is_finished(own, workload),
                rounds=min(end["rounds"] for end in ends),
                final=estimate(end["final_metric"] for end in ends),
                uplink=estimate(end["uplink_bytes"] for end in ends),
                downlink=estimate(end["downlink_bytes"] for end in ends),
                reached={part: reach(own, base, values, rules[part], recipe) for part, values in targets.items()},
                energy=_energy(own),
            )
        )
    return Comparison(workload, reference, rules[TIGHT], targets, estimate(starts.values()), methods)


def usable(method: Method, rounds: int) -> dict[int, list[Row]]:
    """The seeds that figures are made of: the finished ones, or, where none is, all of them as far as all came."""
    finished = {seed: rows for seed, rows in sorted(method.series.items()) if rows[-1]["round"] >= rounds}
    if finished:
        return finished
    shortest = min(len(rows) for rows in method.series.values())
    return {seed: rows[:shortest] for seed, rows in sorted(method.series.items())}


def _reference(workload: Workload) -> str | None:
    """`fedavg` where it was run, else the method that the first run to name one set its own target by."""
    candidates = (REFERENCE, *(run.recipe.target.of for run in workload.runs))
    return next((name for name in candidates if name in workload.methods), None)


def _targets(reference: Series, rule: TargetRule, workload: Workload) -> dict[int, float]:
    """Target metric by seed; empty where the reference has not finished, for its gain is not known then."""
    if not _is_finished(reference, workload):
        return {}
    higher = workload.recipe.evaluation.higher_is_better
    values = {seed: target_value(rows, rule, higher_is_better=higher) for seed, rows in reference.items()}
    return {seed: value for seed, value in values.items() if value is not None}


def _is_finished(series: Series, workload: Workload) -> bool:
    return all(rows[-1]["round"] >= workload.recipe.federation.rounds for rows in series.values())


def _energy(series: Series) -> dict[str, tuple[float, float]]:
    rows = [row for by_seed in series.values() for row in by_seed if row.get("energy")]
    links = rows[0]["energy"] if rows else {}

    def mean(link: str, who: str) -> float:
        return fmean(row["energy"][link][who] for row in rows)

    return {link: (mean(link, "mean"), mean(link, "straggler")) for link in links}


@dataclass(frozen=True)
class Sweep:
    """At least two workloads in ascending order of `values`, the setting `key` (dotted) of their recipes.

    `name` is the recipe's; `methods` are the labels of all of them.
    """

    key: str
    name: str
    values: tuple[float, ...]
    comparisons: tuple[Comparison, ...]
    methods: tuple[str, ...]

    @property
    def title(self) -> str:
        """What its section is called."""
        return f"{self.name}, over {self.key}"

    @property
    def metric(self) -> str:
        """The metric, which all have in common."""
        return self.comparisons[0].workload.recipe.evaluation.metric


def find_sweeps(comparisons: Sequence[Comparison]) -> list[Sweep]:
    """The sweeps among the workloads: those whose recipes agree in all but one number.

    A workload that repeats a value, on other files or another machine, is left out.
    """
    groups: dict[tuple[str, str], dict[float, Comparison]] = {}
    for comparison in comparisons:
        recipe = comparison.workload.recipe.to_dict()
        settings = flatten({key: value for key, value in recipe.items() if key not in FREE})
        for key, value in settings.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                rest = repr(sorted((other, repr(at)) for other, at in settings.items() if other != key))
                groups.setdefault((key, rest), {}).setdefault(float(value), comparison)
    sweeps = []
    for (key, _), by_value in groups.items():
        if len(by_value) > 1:
            values = tuple(sorted(by_value))
            members = tuple(by_value[value] for value in values)
            labels = dict.fromkeys(figures.label for member in members for figures in member.methods)
            name = members[0].workload.recipe.name.partition(",")[0]  # a point of a sweep is `name, key=value`
            sweeps.append(Sweep(key, name, values, members, tuple(labels)))
    return sweeps
