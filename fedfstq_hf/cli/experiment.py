"""Whole federations on this machine: `fedfstq simulate | report | recipes ls | recipes cp | recipes validate`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from fedfstq_hf.cli.options import INTERRUPTED, OVERRIDABLE, parse_overrides, quieten
from fedfstq_hf.errors import ConfigError

app = typer.Typer()
recipes_app = typer.Typer(no_args_is_help=True, help="List, copy and check recipes.")


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
    from fedfstq_hf.recipe.library import sweep_points, without_swept
    from fedfstq_hf.simulation.forkserver import warm_up

    overrides = parse_overrides(context.args)
    loaded = without_swept(load_recipe(recipe, overrides), overrides)
    base = out or Path("runs") / loaded.name
    if workers > 1:
        warm_up()  # imports beside us
    quieten()
    from fedfstq_hf.reporting.comparison.summary import render_summary
    from fedfstq_hf.simulation.runner import SUMMARY_FILE, Simulation, slow_bf16

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


@recipes_app.command("ls")
def recipes_ls() -> None:
    """List the shipped recipes."""
    from fedfstq_hf.recipe import list_recipes, load_recipe

    for name in list_recipes():
        summary = " ".join(load_recipe(name).description.split())
        typer.echo(f"{name:<14} {summary}")


@recipes_app.command("cp")
def recipes_cp(
    name: Annotated[str, typer.Argument(help="Name of a shipped recipe.")],
    target: Annotated[Path, typer.Argument(help="File to write; must not exist.")],
) -> None:
    """Copy a shipped recipe to edit it."""
    from fedfstq_hf.recipe import find_recipe

    source = find_recipe(name)
    if target.exists():
        raise ConfigError(f"{target} exists already; it was left alone. Give another file name.")
    target.write_bytes(source.read_bytes())
    typer.echo(f"Wrote {target}. Run it with: fedfstq simulate {target}")


@recipes_app.command("validate", context_settings=OVERRIDABLE)
def recipes_validate(context: typer.Context, recipe: Annotated[str, typer.Argument(help="Name or path.")]) -> None:
    """Check a recipe without running it."""
    from fedfstq_hf.recipe import load_recipe
    from fedfstq_hf.recipe import validate as check

    loaded = load_recipe(recipe, parse_overrides(context.args))
    check(loaded)
    typer.echo(f"{loaded.name} is valid: methods {', '.join(loaded.methods)}; {loaded.federation.rounds} rounds.")
