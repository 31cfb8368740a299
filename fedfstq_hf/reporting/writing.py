"""From runs to the files of a report: the page, the same in Markdown, and the charts as files of their own."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

from fedfstq_hf.errors import ConfigError
from fedfstq_hf.federation import storage
from fedfstq_hf.reporting.comparison.runs import read_run, read_runs
from fedfstq_hf.reporting.markdown import render_markdown
from fedfstq_hf.reporting.page import render_page
from fedfstq_hf.reporting.report import make_report

PAGE_FILE, TEXT_FILE = "report.html", "report.md"


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
    _replace(page, render_page(report))
    _replace(text, render_markdown(report, page=page.name, images=images))
    for name, path in drawn.items():
        _replace(path, f"<!-- {report.mark} -->\n{report.charts()[name].svg(name, alone=True)}\n")
    return page, text


def write_run_report(folder: str | Path, *, command: str) -> Path:
    """Write `report.html`, `report.md` and the charts of quality as PNG into a run's own folder; returns the Markdown.

    `command` is the line that runs it again.
    """
    folder = Path(folder)
    run = replace(read_run(folder), command=command)
    report = make_report([run], tool="fedfstq simulate", command=command)
    images = {}
    for name, chart in report.charts().items():
        if chart.name.startswith("quality"):
            images[name] = f"{chart.name}.png"
            _replace(folder / images[name], chart.png())
    _replace(folder / PAGE_FILE, render_page(report))
    _replace(folder / TEXT_FILE, render_markdown(report, page=PAGE_FILE, images=images))
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
