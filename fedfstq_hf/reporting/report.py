"""`fedfstq report`: finished or interrupted runs side by side, as one HTML page and the same tables in Markdown."""

import os
from collections.abc import Sequence
from pathlib import Path

from fedfstq_hf.errors import ConfigError
from fedfstq_hf.reporting.comparison.figures import Comparison, Sweep, compare, find_sweeps
from fedfstq_hf.reporting.comparison.runs import read_runs
from fedfstq_hf.reporting.comparison.workloads import group_runs
from fedfstq_hf.reporting.markdown import MARK, render_markdown
from fedfstq_hf.reporting.page import GENERATOR, render_page
from fedfstq_hf.reporting.page_figures import GENERATOR as FIGURE_MARK
from fedfstq_hf.reporting.page_figures import figures


def write_comparison(
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
        plots: a folder for each plot as an SVG of its own; None for none.
        methods: of these methods only; None for all.

    Raises:
        ConfigError: a folder holds no run, or `out` or `plots` cannot be written to.
        DataError: a run cannot be read, or two hold the same method and seed with different rows.
    """
    page = Path(out)
    if page.suffix != ".html":
        raise ConfigError(f"--out is {page}; expected the name of a page. Type --out {page.with_suffix('.html')}")
    text = page.with_suffix(".md")
    for path, mark in ((page, GENERATOR), (text, MARK)):
        _check_free(path, mark, f"--out {path.with_name('comparison.html')}")
    comparisons = [compare(workload) for workload in group_runs(read_runs(folders, methods))]
    sweeps = find_sweeps(comparisons)
    title = _title(comparisons, sweeps)
    drawn = {} if plots is None else {Path(plots) / name: svg for name, svg in figures(comparisons, sweeps)}
    if plots is not None and Path(plots).exists() and not Path(plots).is_dir():
        raise ConfigError(f"--plots is {plots}, which is a file; expected a folder for the plots.")
    for path in drawn:
        _check_free(path, FIGURE_MARK, f"--plots {Path(str(plots) + '-new')}")
    page.parent.mkdir(parents=True, exist_ok=True)
    _replace(page, render_page(comparisons, sweeps, title=title, command=command))
    _replace(text, render_markdown(comparisons, sweeps, title=title, command=command, page=page.name))
    for path, svg in drawn.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, svg)
    return page, text


def _title(comparisons: Sequence[Comparison], sweeps: Sequence[Sweep]) -> str:
    sweep_of = {id(point): sweep.name for sweep in sweeps for point in sweep.comparisons}
    names = list(dict.fromkeys(sweep_of.get(id(one), one.workload.name) for one in comparisons))
    return f"{', '.join(names[:3])}{' and others' if len(names) > 3 else ''}: methods side by side"


def _check_free(path: Path, mark: str, other: str) -> None:
    """A run's own report.md, or a file of somebody else, is not overwritten."""
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; expected the name of a page. Type --out {path / 'comparison.html'}")
    if path.exists() and mark not in path.read_text(encoding="utf-8", errors="replace"):
        raise ConfigError(
            f"{path} exists and was not made by `fedfstq report`; it was left alone. Give another name: {other}"
        )


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
