"""The figures of one workload: every method against the targets that the reference's improvement sets.

Figures are means over the seeds that a method has finished; ratios pair a method with the reference seed by seed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

from fedfstq_hf.reporting.comparison_estimate import Estimate, estimate
from fedfstq_hf.reporting.comparison_targets import Reached, Series, reach
from fedfstq_hf.reporting.comparison_workloads import Method, Workload
from fedfstq_hf.reporting.summary import REFERENCE, Row, TargetRule, metric_of, target_value, totals

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
    links: Mapping[str, Mapping[str, float]] = rows[0]["energy"] if rows else {}
    return {
        link: (
            fmean(row["energy"][link]["mean"] for row in rows),
            fmean(row["energy"][link]["straggler"] for row in rows),
        )
        for link in links
    }
