"""The `fedfstq` command, one module for each role. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import logging
import sys
from typing import Annotated, Any

import typer

from fedfstq_hf import __version__
from fedfstq_hf.cli import coordinate, experiment, participate, sharing
from fedfstq_hf.errors import FedFSTQError
from fedfstq_hf.text import printable

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it wherever it is installed

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Federated LoRA fine-tuning in Fisher-guided messages. Start with: fedfstq simulate quickstart",
)
for group in (experiment, coordinate, participate, sharing):
    app.add_typer(group.app)
app.add_typer(experiment.recipes_app, name="recipes")
app.add_typer(participate.keys_app, name="keys")


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


def main(arguments: list[str] | None = None) -> Any:
    """Entry point: errors of ours become one message and exit code 2, without a traceback."""
    try:
        return app(args=arguments, standalone_mode=True)
    except FedFSTQError as error:
        text = "\n".join(printable(line, 4000) for line in str(error).split("\n"))  # it may quote what others wrote
        typer.secho(f"fedfstq: {text}", fg=typer.colors.RED, err=True)
        sys.exit(2)
