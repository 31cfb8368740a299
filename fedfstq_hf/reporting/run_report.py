"""A report of runs: what is in it, as one HTML page and as Markdown, and its charts as files.

The page needs no script and fetches nothing. The Markdown holds the same tables and notes.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from urllib.parse import quote

from fedfstq_hf import __version__
from fedfstq_hf.errors import ConfigError
from fedfstq_hf.federation import storage
from fedfstq_hf.reporting.chart import FONT, Chart, style_sheet
from fedfstq_hf.reporting.comparison.figures import compare, find_sweeps
from fedfstq_hf.reporting.comparison.findings import CAVEATS, findings, notes, settings
from fedfstq_hf.reporting.comparison.plots import file_name, styles, sweep_chart, workload_charts
from fedfstq_hf.reporting.comparison.runs import Run, read_run, read_runs
from fedfstq_hf.reporting.comparison.tables import Table, figure_tables, link_table, overview, run_table, sweep_tables
from fedfstq_hf.reporting.comparison.workloads import group_runs

PAGE_FILE, TEXT_FILE = "report.html", "report.md"


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


def write_report(
    folders: Sequence[str | Path],
    out: str | Path,
    *,
    command: str,
    plots: str | Path | None = None,
    methods: Sequence[str] | None = None,
) -> tuple[Path, Path]:
    """Write the page `out` and, beside it, the same name with `.md`; returns both paths.

    Args:
        folders: run folders of `fedfstq simulate`, or archives of such runs.
        out: the page, ending in `.html`. An earlier page is replaced, a file of anything else is not.
        command: the line that makes the page again.
        plots: a folder for each chart as an SVG of its own, which the Markdown then shows; None for none.
        methods: of these methods only; None for all.

    Raises:
        ConfigError: a folder holds no run, or `out` or `plots` cannot be written to.
        DataError: a run cannot be read, or two hold the same method and seed with different rows.
    """
    page = Path(out)
    if page.suffix != ".html":
        raise ConfigError(f"--out is {page}; expected the name of a page. Type --out {page.with_suffix('.html')}")
    text = page.with_suffix(".md")
    report = make_report(read_runs(folders, methods), tool="fedfstq report", command=command)
    for path in (page, text):
        _check_free(path, report.mark, f"--out {path.with_name('comparison.html')}")
    drawn: dict[str, Path] = {}
    if plots is not None:
        if Path(plots).exists() and not Path(plots).is_dir():
            raise ConfigError(f"--plots is {plots}, which is a file; expected a folder for the plots.")
        drawn = {name: Path(plots) / f"{name}.svg" for name in report.charts()}
        for path in drawn.values():
            _check_free(path, report.mark, f"--plots {Path(str(plots) + '-new')}")
    images = {name: quote(Path(os.path.relpath(path, text.parent)).as_posix()) for name, path in drawn.items()}
    _replace(page, _page(report))
    _replace(text, _markdown(report, page.name, images))
    for name, path in drawn.items():
        _replace(path, f"<!-- {report.mark} -->\n{report.charts()[name].svg(name, alone=True)}\n")
    return page, text


def write_run_report(folder: str | Path, *, command: str) -> Path:
    """Write `report.html`, `report.md` and the charts of quality as PNG into a run's own folder; returns the Markdown.

    `command` is the line that runs it again.
    """
    folder = Path(folder)
    report = make_report([replace(read_run(folder), command=command)], tool="fedfstq simulate", command=command)
    images = {}
    for name, chart in report.charts().items():
        if chart.name.startswith("quality"):
            images[name] = f"{chart.name}.png"
            _replace(folder / images[name], chart.png())
    _replace(folder / PAGE_FILE, _page(report))
    _replace(folder / TEXT_FILE, _markdown(report, PAGE_FILE, images))
    return folder / TEXT_FILE


def _check_free(path: Path, mark: str, other: str) -> None:
    """A run's own report, or a file of somebody else, is not overwritten."""
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; expected the name of a page. Type --out {path / 'comparison.html'}")
    if path.exists() and mark not in path.read_text(encoding="utf-8", errors="replace"):
        raise ConfigError(
            f"{path} exists and was not made by `fedfstq report`; it was left alone. Give another name: {other}"
        )


def _replace(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    storage.replace_file(path, content.encode() if isinstance(content, str) else content, durable=False)


def _page(report: Report) -> str:
    """HTML; every text out of a run is escaped."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    source = resources.files(__package__).joinpath("page_template.html").read_text(encoding="utf-8")
    drawn = [
        [chart.svg(f"w{number}-c{place}") for place, chart in enumerate(section.charts, start=1)]
        for number, section in enumerate(report.sections, start=1)
    ]
    page = environment.from_string(source).render(
        report=report, drawn=drawn, version=__version__, font=FONT, style_sheet=style_sheet(), caveats=CAVEATS
    )
    return page + "\n"


def _markdown(report: Report, page: str, images: Mapping[str, str]) -> str:
    """The text beside the page `page`. `images` are files of charts, by the names that `Report.charts` gives them."""
    parts = [f"<!-- {report.mark} -->", f"# {_escape(report.title)}", f"```\n{report.command}\n```"]
    parts.append(f"With all plots: [{_escape(page)}]({page})")
    if report.overview is not None:
        parts += ["## Overview", _table(report.overview)]
    paths = {id(chart): images.get(name) for name, chart in report.charts().items()}
    for section in report.sections:
        parts += [f"## {_escape(section.name)}", _escape(section.description)]
        parts.append("\n".join(f"- {_escape(line)}" for line in section.findings))
        parts.append("\n".join(f"- {term}: {_escape(text)}" for term, text in section.settings))
        if section.notes:
            parts.append("\n".join(["### To know first", "", *(f"- {_escape(line)}" for line in section.notes)]))
        parts += map(_table, section.tables)
        parts += [f"![{_escape(chart.title)}]({paths[id(chart)]})" for chart in section.charts if paths[id(chart)]]
        parts += map(_table, section.appendix)
    parts += ["## What was measured and what was modelled", "\n".join(f"- {line}" for line in CAVEATS)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(table: Table) -> str:
    align = ["---" if column == 0 or column in table.text_columns else "---:" for column in range(len(table.head))]
    lines = [map(_escape, table.head), align, *(map(_escape, row) for row in table.rows)]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"### {_escape(table.title)}\n\n{text}" + (f"\n\n{_escape(table.note)}" if table.note else "")


def _escape(text: str) -> str:
    """`text` with what Markdown or HTML would read as markup made plain; one line."""
    return re.sub(r"([\\`*\[\]<>|#]|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(text.split()))
