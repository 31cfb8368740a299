"""`fedfstq report`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run folders of `fedfstq simulate`, or WORKLOAD.jsonl.zst.")
    ],
    out: Annotated[
        Path, typer.Option(metavar="FILE.html", help="The page; the same tables as Markdown go beside it.")
    ] = Path("report.html"),
    plots: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Write each plot there as well, as an SVG of its own.")
    ] = None,
    methods: Annotated[str | None, typer.Option(metavar="NAME,NAME", help="Of these methods only.")] = None,
) -> None:
    """Put runs side by side: one HTML page with plots, and its tables as Markdown.

    Runs of the same workload are merged, whatever their methods and seeds; others get sections of their own.
    """
    from fedfstq_hf.reporting.run_report import write_report

    more = [] if plots is None else ["--plots", str(plots)]
    more += [] if methods is None else ["--methods", methods]
    command = shlex.join(["fedfstq", "report", *map(str, runs), "--out", str(out), *more])
    page, text = write_report(runs, out, command=command, plots=plots, methods=methods.split(",") if methods else None)
    typer.echo(f"Wrote {page} and {text}.")
