"""A report as Markdown: the tables and notes of the page, and those of its charts that are files of their own."""

import re
from collections.abc import Mapping

from fedfstq_hf.reporting.comparison.notes import CAVEATS
from fedfstq_hf.reporting.comparison.tables import Table
from fedfstq_hf.reporting.report import Report, Section


def render_markdown(report: Report, *, page: str, images: Mapping[str, str]) -> str:
    """The text of the file beside the page `page`.

    `images` are the files of charts, relative to it, by the names that `Report.charts` gives them.
    """
    parts = [f"<!-- {report.mark} -->", f"# {escape(report.title)}", f"```\n{report.command}\n```"]
    parts.append(f"With all plots: [{escape(page)}]({page})")
    if report.overview is not None:
        parts += ["## Overview", _table(report.overview)]
    paths = {id(chart): images.get(name) for name, chart in report.charts().items()}
    for section in report.sections:
        shown = [(chart, paths[id(chart)]) for chart in section.charts if paths[id(chart)]]
        parts += [*_section(section), *(f"![{escape(chart.title)}]({path})" for chart, path in shown)]
        parts += map(_table, section.appendix)
    parts += ["## What was measured and what was modelled", "\n".join(f"- {line}" for line in CAVEATS)]
    return "\n\n".join(part for part in parts if part) + "\n"


def escape(text: str) -> str:
    """`text` with what Markdown or HTML would read as markup made plain; one line."""
    return re.sub(r"([\\`*\[\]<>|#]|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(text.split()))


def _section(section: Section) -> list[str]:
    parts = [f"## {escape(section.name)}", escape(section.description)]
    parts.append("\n".join(f"- {escape(line)}" for line in section.findings))
    parts.append("\n".join(f"- {term}: {escape(text)}" for term, text in section.settings))
    if section.notes:
        parts.append("\n".join(["### To know first", "", *(f"- {escape(line)}" for line in section.notes)]))
    return [*parts, *map(_table, section.tables)]


def _table(table: Table) -> str:
    align = ["---" if column == 0 or column in table.text_columns else "---:" for column in range(len(table.head))]
    lines = [[escape(cell) for cell in table.head], align, *([escape(cell) for cell in row] for row in table.rows)]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"### {escape(table.title)}\n\n{text}" + (f"\n\n{escape(table.note)}" if table.note else "")
