"""`fedfstq recipes ls | cp | validate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedfstq_hf.cli.options import OVERRIDABLE, parse_overrides
from fedfstq_hf.errors import ConfigError

app = typer.Typer(no_args_is_help=True, help="List, copy and check recipes.")


@app.command("ls")
def recipes_ls() -> None:
    """List the shipped recipes."""
    from fedfstq_hf.recipe import list_recipes, load_recipe

    for name in list_recipes():
        summary = " ".join(load_recipe(name).description.split())
        typer.echo(f"{name:<14} {summary}")


@app.command("cp")
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


@app.command("validate", context_settings=OVERRIDABLE)
def recipes_validate(context: typer.Context, recipe: Annotated[str, typer.Argument(help="Name or path.")]) -> None:
    """Check a recipe without running it."""
    from fedfstq_hf.recipe import load_recipe
    from fedfstq_hf.recipe import validate as check

    loaded = load_recipe(recipe, parse_overrides(context.args))
    check(loaded)
    typer.echo(f"{loaded.name} is valid: methods {', '.join(loaded.methods)}; {loaded.federation.rounds} rounds.")
