"""The comparison as Markdown: the tables and notes of the page, without its plots."""

import re
from collections.abc import Sequence

from fedfstq_hf.reporting.comparison.figures import Comparison, Sweep
from fedfstq_hf.reporting.comparison.notes import CAVEATS, notes, settings
from fedfstq_hf.reporting.comparison.tables import (
    Table,
    figure_tables,
    link_table,
    overview,
    run_table,
    sweep_tables,
)

MARK = "<!-- made by fedfstq report -->"


def render_markdown(
    comparisons: Sequence[Comparison], sweeps: Sequence[Sweep], *, title: str, command: str, page: str
) -> str:
    """The text of the file beside the page `page`."""
    parts = [MARK, f"# {escape(title)}", f"```\n{command}\n```", f"With plots: [{escape(page)}]({page})"]
    if (table := overview(comparisons, sweeps)) is not None:
        parts += ["## Overview", _table(table)]
    for sweep in sweeps:
        parts += [f"## {escape(sweep.title)}", *map(_table, sweep_tables(sweep))]
    for comparison in comparisons:
        workload = comparison.workload
        parts += [f"## {escape(workload.name)}", escape(" ".join(workload.recipe.description.split()))]
        parts.append("\n".join(f"- {term}: {escape(text)}" for term, text in settings(workload)))
        if lines := notes(comparison):
            parts.append("\n".join(["### To know first", "", *(f"- {escape(line)}" for line in lines)]))
        for table in (*figure_tables(comparison), link_table(workload.recipe.links), run_table(workload.runs)):
            parts.append(_table(table))
    parts += ["## What was measured and what was modelled", "\n".join(f"- {line}" for line in CAVEATS)]
    return "\n\n".join(part for part in parts if part) + "\n"


def escape(text: str) -> str:
    """`text` with what Markdown or HTML would read as markup made plain; one line."""
    return re.sub(r"([\\`*\[\]<>|#]|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(text.split()))


def _table(table: Table) -> str:
    align = ["---" if column == 0 or column in table.text_columns else "---:" for column in range(len(table.head))]
    lines = [[escape(cell) for cell in table.head], align, *([escape(cell) for cell in row] for row in table.rows)]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"### {escape(table.title)}\n\n{text}" + (f"\n\n{escape(table.note)}" if table.note else "")
