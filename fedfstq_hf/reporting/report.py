"""A report as data, which the page and the Markdown both print: what is in it and in what order."""

from collections.abc import Sequence
from dataclasses import dataclass

from fedfstq_hf.reporting.chart import Chart
from fedfstq_hf.reporting.charts import file_name, styles, sweep_chart, workload_charts
from fedfstq_hf.reporting.comparison.figures import compare, find_sweeps
from fedfstq_hf.reporting.comparison.notes import findings, notes, settings
from fedfstq_hf.reporting.comparison.runs import Run
from fedfstq_hf.reporting.comparison.tables import Table, figure_tables, link_table, overview, run_table, sweep_tables
from fedfstq_hf.reporting.comparison.workloads import group_runs


@dataclass(frozen=True)
class Section:
    """A workload or a sweep. `appendix` holds the tables that come after the charts."""

    name: str
    description: str
    charts: Sequence[Chart]
    tables: Sequence[Table]
    settings: Sequence[tuple[str, str]] = ()
    findings: Sequence[str] = ()
    notes: Sequence[str] = ()
    appendix: Sequence[Table] = ()


@dataclass(frozen=True)
class Report:
    """`tool` is the command that writes it, `command` the line that makes it again."""

    title: str
    tool: str
    command: str
    overview: Table | None
    sections: Sequence[Section]

    @property
    def mark(self) -> str:
        """What its files hold, so that no others are written over."""
        return f"made by {self.tool}"

    def charts(self) -> dict[str, Chart]:
        """All charts by the name of their file, which begins with the section's: `fed_med-quality_vs_uplink`."""
        named: dict[str, Chart] = {}
        for section in self.sections:
            prefix = file_name(section.name)
            if any(name.startswith(f"{prefix}-") for name in named):
                prefix = f"{prefix}-{len(named)}"
            named |= {f"{prefix}-{chart.name}": chart for chart in section.charts}
        return named


def make_report(runs: Sequence[Run], *, tool: str, command: str) -> Report:
    """Everything about `runs`, from their rows and recipes alone.

    Raises:
        DataError: two runs hold the same method and seed with different rows.
    """
    comparisons = [compare(workload) for workload in group_runs(runs)]
    sweeps = find_sweeps(comparisons)
    style_of = styles(comparisons)
    below = "Each value has a section of its own below."
    sections = [Section(one.title, below, [sweep_chart(one, style_of)], sweep_tables(one)) for one in sweeps]
    for comparison in comparisons:
        workload = comparison.workload
        sections.append(
            Section(
                workload.name,
                " ".join(workload.recipe.description.split()),
                workload_charts(comparison, style_of),
                figure_tables(comparison),
                settings(workload),
                findings(comparison),
                notes(comparison),
                [link_table(workload.recipe.links), run_table(workload.runs)],
            )
        )
    sweep_of = {id(point): sweep.name for sweep in sweeps for point in sweep.comparisons}
    names = list(dict.fromkeys(sweep_of.get(id(one), one.workload.name) for one in comparisons))
    title = f"{', '.join(names[:3])}{' and others' if len(names) > 3 else ''}: methods side by side"
    return Report(title, tool, command, overview(comparisons, sweeps), sections)
