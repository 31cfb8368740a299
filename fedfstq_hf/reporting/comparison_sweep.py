"""Workloads that differ in one number, side by side: what a recipe's `sweep:` makes, or runs with an override."""

from collections.abc import Sequence
from dataclasses import dataclass

from fedfstq_hf.reporting.comparison_figures import TIGHT, Comparison
from fedfstq_hf.reporting.comparison_tables import NONE, Table, ratio_text, with_spread
from fedfstq_hf.reporting.comparison_workloads import FREE, flatten
from fedfstq_hf.reporting.units import format_bytes, format_figure


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


def sweep_tables(sweep: Sweep) -> list[Table]:
    """Where each method ended, and what it sent, at each value."""
    seeds = {len(figures.series) for member in sweep.comparisons for figures in member.methods}
    better = "higher" if sweep.comparisons[0].workload.recipe.evaluation.higher_is_better else "lower"
    note = f"{sweep.key} at the head of each column; {better} is better. "
    note += f"{_count(min(seeds))} each." if len(seeds) == 1 else f"{min(seeds)} to {_count(max(seeds))} each."
    head = ["method", *(f"{value:g}" for value in sweep.values)]
    final, uplink, ratios = [], [], []
    for label in sweep.methods:
        found = [member.find(label) for member in sweep.comparisons]
        final.append([label, *(NONE if f is None else format_figure(f.final.mean, f.final.spread) for f in found)])
        uplink.append([label, *(NONE if f is None else with_spread(f.uplink, format_bytes) for f in found)])
        reached = [None if f is None else f.reached.get(TIGHT) for f in found]
        ratios.append([label, *(NONE if r is None else ratio_text(r.uplink_ratio) for r in reached)])
    tables = [Table(f"Final {sweep.metric}", head, final, note), Table("Uplink in total", head, uplink)]
    if any(cell != NONE for row in ratios for cell in row[1:]):
        reference = next(member.reference for member in sweep.comparisons if member.targets)
        title = f"Uplink to {100 * TIGHT:g} % of {reference}'s improvement: times fewer bytes"
        tables.append(Table(title, head, ratios, f"{NONE}: not reached in every seed."))
    return tables


def _count(seeds: int) -> str:
    return f"{seeds} seed{'' if seeds == 1 else 's'}"
