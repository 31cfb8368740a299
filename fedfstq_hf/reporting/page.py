"""A report as one HTML file: tables and charts inline, no script, nothing fetched, light and dark."""

from importlib import resources

from fedfstq_hf import __version__
from fedfstq_hf.reporting.chart import FONT, style_sheet
from fedfstq_hf.reporting.comparison.notes import CAVEATS
from fedfstq_hf.reporting.report import Report

_TEMPLATE = "page_template.html"


def render_page(report: Report) -> str:
    """The page's HTML; every text out of a run is escaped."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    source = resources.files("fedfstq_hf.reporting").joinpath(_TEMPLATE).read_text(encoding="utf-8")
    drawn = [
        [chart.svg(f"w{number}-c{place}") for place, chart in enumerate(section.charts, start=1)]
        for number, section in enumerate(report.sections, start=1)
    ]
    page = environment.from_string(source).render(
        report=report, drawn=drawn, version=__version__, font=FONT, style_sheet=style_sheet(), caveats=CAVEATS
    )
    return page + "\n"
