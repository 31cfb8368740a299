"""`fedfstq simulate`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from fedfstq_hf.cli.options import INTERRUPTED, OVERRIDABLE, parse_overrides, quieten

app = typer.Typer()


@app.command(context_settings=OVERRIDABLE)
def simulate(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help="Name of a shipped recipe, or path of a YAML file.")],
    out: Annotated[Path | None, typer.Option(help="Output folder; runs/RECIPE when not given.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    workers: Annotated[
        int, typer.Option(help="Processes that train a round's clients side by side; they share the base model.")
    ] = 1,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Run a whole federation on this machine, several methods side by side.

    Any key of the recipe can be changed: --model PATH --data FILE --seeds 3 --training.learning_rate 1e-3
    """
    from fedfstq_hf.recipe import load_recipe
    from fedfstq_hf.recipe.sweep import sweep_points, without_swept
    from fedfstq_hf.simulation.processes import warm_up

    overrides = parse_overrides(context.args)
    loaded = without_swept(load_recipe(recipe, overrides), overrides)
    base = out or Path("runs") / loaded.name
    if workers > 1:
        warm_up()  # imports beside us
    quieten()
    from fedfstq_hf.reporting.comparison.summary import render_summary
    from fedfstq_hf.simulation.precision import slow_bf16
    from fedfstq_hf.simulation.runner import SUMMARY_FILE, Simulation

    command = shlex.join(["fedfstq", "simulate", recipe, *context.args])
    if (slow := slow_bf16(loaded)) is not None:
        typer.echo(slow, err=True)
    for label, point in sweep_points(loaded):
        folder = base / label
        try:
            simulation = Simulation(point, folder, resume=resume, progress=not quiet, command=command, workers=workers)
            summary = simulation.run()
        except KeyboardInterrupt:
            typer.echo(
                f"\nStopped. Go on with: {command} --out {base} --resume{f' --workers {workers}' * (workers > 1)}",
                err=True,
            )
            raise typer.Exit(INTERRUPTED) from None
        typer.echo(f"{label}\n" * bool(label) + render_summary(summary))
        typer.echo(
            f"\nReport: {folder / 'report.md'}   figures: {folder / SUMMARY_FILE}   adapter: {folder / 'adapter'}"
        )
