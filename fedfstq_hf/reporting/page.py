"""The comparison as one HTML file: tables and charts inline, no script, nothing fetched."""

from collections.abc import Sequence
from importlib import resources
from typing import Any

from fedfstq_hf import __version__
from fedfstq_hf.reporting.chart import Chart, draw, draw_swatch
from fedfstq_hf.reporting.charts import make_charts, styles, sweep_chart
from fedfstq_hf.reporting.comparison.figures import Comparison, Sweep
from fedfstq_hf.reporting.comparison.notes import CAVEATS, notes, settings
from fedfstq_hf.reporting.comparison.tables import figure_tables, link_table, overview, run_table, sweep_tables
from fedfstq_hf.reporting.page_figures import chart_style

GENERATOR = '<meta name="generator" content="fedfstq report">'
_TEMPLATE = "page_template.html"


def render_page(comparisons: Sequence[Comparison], sweeps: Sequence[Sweep], *, title: str, command: str) -> str:
    """The page's HTML; every text out of a run is escaped."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    source = resources.files("fedfstq_hf.reporting").joinpath(_TEMPLATE).read_text(encoding="utf-8")
    style_of = styles(comparisons)
    sections = [_sweep_section(sweep, style_of, f"s{n}") for n, sweep in enumerate(sweeps, start=1)]
    sections += [_section(comparison, style_of, f"w{n}") for n, comparison in enumerate(comparisons, start=1)]
    page = environment.from_string(source).render(
        title=title,
        command=command,
        version=__version__,
        generator=GENERATOR,
        chart_style=chart_style(),
        overview=overview(comparisons, sweeps),
        sections=sections,
        caveats=CAVEATS,
    )
    return page + "\n"


def _section(comparison: Comparison, style_of: dict[str, int], key: str) -> dict[str, Any]:
    workload = comparison.workload
    labels = [figures.label for figures in comparison.methods]
    return {
        "key": key,
        "name": workload.name,
        "description": " ".join(workload.recipe.description.split()),
        "settings": settings(workload),
        "notes": notes(comparison),
        "tables": figure_tables(comparison),
        "charts": [_drawn(chart) for chart in make_charts(comparison, style_of, key)],
        "legend": _legend(labels, style_of),
        "appendix": [link_table(workload.recipe.links), run_table(workload.runs)],
    }


def _sweep_section(sweep: Sweep, style_of: dict[str, int], key: str) -> dict[str, Any]:
    return {
        "key": key,
        "name": sweep.title,
        "description": "Each value has a section of its own below.",
        "settings": [],
        "notes": [],
        "tables": sweep_tables(sweep),
        "charts": [_drawn(sweep_chart(sweep, style_of, key))],
        "legend": _legend(sweep.methods, style_of),
        "appendix": [],
    }


def _drawn(chart: Chart) -> dict[str, str]:
    return {"svg": draw(chart), "title": chart.title, "alt": chart.alt, "key": chart.key}


def _legend(labels: Sequence[str], style_of: dict[str, int]) -> list[dict[str, str]]:
    return [{"swatch": draw_swatch(style_of[label]), "label": label} for label in labels]
