"""The comparison as one HTML file: tables and charts inline, no script, nothing fetched."""

from collections.abc import Sequence
from importlib import resources
from typing import Any

from fedfstq_hf import __version__
from fedfstq_hf.reporting.comparison_figures import Comparison
from fedfstq_hf.reporting.comparison_notes import CAVEATS, notes, settings
from fedfstq_hf.reporting.comparison_tables import figure_tables, link_table, run_table
from fedfstq_hf.reporting.page_chart import draw, draw_swatch
from fedfstq_hf.reporting.page_figures import chart_style
from fedfstq_hf.reporting.page_plots import make_charts, styles

GENERATOR = '<meta name="generator" content="fedfstq report">'
_TEMPLATE = "page_template.html"


def render_page(comparisons: Sequence[Comparison], *, title: str, command: str) -> str:
    """The page's HTML; every text out of a run is escaped."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    source = resources.files("fedfstq_hf.reporting").joinpath(_TEMPLATE).read_text(encoding="utf-8")
    style_of = styles(comparisons)
    sections = [_section(comparison, style_of, f"w{number}") for number, comparison in enumerate(comparisons, start=1)]
    page = environment.from_string(source).render(
        title=title,
        command=command,
        version=__version__,
        generator=GENERATOR,
        chart_style=chart_style(),
        sections=sections,
        caveats=CAVEATS,
    )
    return page + "\n"


def _section(comparison: Comparison, style_of: dict[str, int], key: str) -> dict[str, Any]:
    workload = comparison.workload
    charts = make_charts(comparison, style_of, key)
    return {
        "key": key,
        "name": workload.name,
        "description": " ".join(workload.recipe.description.split()),
        "settings": settings(workload),
        "notes": notes(comparison),
        "tables": figure_tables(comparison),
        "charts": [{"svg": draw(chart), "title": chart.title, "alt": chart.alt, "key": chart.key} for chart in charts],
        "legend": [
            {"swatch": draw_swatch(style_of[figures.label]), "label": figures.label} for figures in comparison.methods
        ],
        "appendix": [link_table(workload.recipe.links), run_table(workload.runs)],
    }
