"""The page's charts as SVG files of their own, with title and legend, for a README or a paper."""

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from importlib import resources

from fedfstq_hf.reporting.chart import HEIGHT, WIDTH, Chart, draw, draw_swatch
from fedfstq_hf.reporting.charts import make_charts, styles, sweep_chart
from fedfstq_hf.reporting.comparison.figures import Comparison, Sweep

GENERATOR = "made by fedfstq report"
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', 'DejaVu Sans', sans-serif"
_MARGIN, _TITLE, _ROW = 12, 34, 22
_SWATCH, _GLYPH = 50, 7.4
"""Width of a legend's sample with the gap behind it, and of one letter at 13 px, generously."""


def chart_style() -> str:
    """The style sheet of page and figures."""
    return resources.files("fedfstq_hf.reporting").joinpath("chart.css").read_text(encoding="utf-8").strip()


def figures(comparisons: Sequence[Comparison], sweeps: Sequence[Sweep]) -> Iterator[tuple[str, str]]:
    """Name and text of each chart of each sweep and workload, such as `main_fed_med-uplink-per-round.svg`."""
    style_of = styles(comparisons)
    for number, sweep in enumerate(sweeps, start=1):
        chart = sweep_chart(sweep, style_of, f"s{number}")
        yield f"{_slug(sweep.name)}-{_slug(chart.title)}.svg", render(chart, sweep.name)
    taken: set[str] = set()
    for number, comparison in enumerate(comparisons, start=1):
        workload = _slug(comparison.workload.name)
        if workload in taken:
            workload = f"{workload}-{number}"
        taken.add(workload)
        for chart in make_charts(comparison, style_of, f"w{number}"):
            yield f"{workload}-{_slug(chart.title)}.svg", render(chart, comparison.workload.name)


def render(chart: Chart, workload: str) -> str:
    """One chart with its title above and its legend below."""
    rows = _legend_rows(chart)
    height = _TITLE + HEIGHT + _ROW * len(rows) + _MARGIN
    size = {"viewBox": f"0 0 {WIDTH} {height}", "width": f"{WIDTH}", "height": f"{height}"}
    root = ET.Element("svg", {"xmlns": "http://www.w3.org/2000/svg", **size})
    root.append(ET.Comment(f" {GENERATOR} "))
    ET.SubElement(root, "style").text = f"{chart_style()}\nsvg {{ font: 13px {_FONT}; }}"
    ET.SubElement(root, "rect", {"width": "100%", "height": "100%", "style": "fill: var(--page)"})
    name = {"x": f"{_MARGIN}", "y": "22", "style": "fill: var(--ink); font-weight: 600; font-size: 14px"}
    ET.SubElement(root, "text", name).text = f"{workload}: {chart.title[:1].lower()}{chart.title[1:]}"
    _place(root, draw(chart), x=0, y=_TITLE, width=WIDTH, height=HEIGHT)
    for row, entries in enumerate(rows):
        y = _TITLE + HEIGHT + _ROW * row
        for x, style, label in entries:
            _place(root, draw_swatch(style), x=x, y=y + 4, width=44, height=14)
            text = {"x": f"{x + _SWATCH:.0f}", "y": f"{y + 15}", "style": "fill: var(--ink)"}
            ET.SubElement(root, "text", text).text = label
    return ET.tostring(root, encoding="unicode") + "\n"


def _place(root: ET.Element, svg: str, **place: float) -> None:
    child = ET.fromstring(svg)
    child.attrib |= {key: f"{value:.0f}" for key, value in place.items()}
    root.append(child)


def _legend_rows(chart: Chart) -> list[list[tuple[float, int, str]]]:
    """Place across, style and label of each series, in as many rows as they need."""
    rows: list[list[tuple[float, int, str]]] = [[]]
    x = float(_MARGIN)
    for series in chart.series:
        width = _SWATCH + _GLYPH * len(series.label) + 18
        if rows[-1] and x + width > WIDTH:
            rows.append([])
            x = float(_MARGIN)
        rows[-1].append((x, series.style, series.label))
        x += width
    return rows


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9_]+", "-", text.lower()).strip("-") or "figure"
