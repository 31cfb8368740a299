"""Taking part and looking on: `fedfstq train | status`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from fedfstq_hf.cli.options import INTERRUPTED, OVERRIDABLE, parse_overrides, quieten
from fedfstq_hf.errors import ConfigError

app = typer.Typer()


@app.command(context_settings=OVERRIDABLE)
def train(
    context: typer.Context,
    client_file: Annotated[Path, typer.Argument(help="YAML file with mailbox, client_id and data.path.")],
    yes: Annotated[bool, typer.Option("--yes", help="Take part without being asked, as scripts do.")] = False,
) -> None:
    """Take part in a federation as one client. Stop and restart it at any time.

    What the federation asks is shown once, at the first start, and has to be agreed to. Anything else is refused later.

    Any key of the file can be changed: --client_id c2 --data.path mine.jsonl --training.per_device_train_batch_size 2
    """
    from fedfstq_hf.running.client_file import load_client_file

    settings = load_client_file(client_file, parse_overrides(context.args))
    quieten()
    from fedfstq_hf.running.train import run_client

    try:
        run_client(settings, consent=lambda lines: _ask(lines, yes))
    except KeyboardInterrupt:
        typer.echo(f"\nStopped. Go on with: fedfstq train {client_file}", err=True)
        raise typer.Exit(INTERRUPTED) from None


def _ask(lines: Sequence[str], yes: bool) -> None:
    """Show what is asked, and go on if the answer is yes."""
    typer.echo("\n".join(lines))
    if yes:
        return
    if sys.stdin is None or not sys.stdin.isatty():
        raise ConfigError("There is no terminal to ask whether to take part. If you have read the above, type --yes.")
    if not typer.confirm("Take part?"):
        typer.echo("Nothing was agreed to, and nothing was sent.", err=True)
        raise typer.Exit(1)


@app.command()
def status(mailbox: Annotated[str, typer.Argument(help="Address of a federation: hf://ORG/REPO or a folder.")]) -> None:
    """Rounds so far: who sent what, how many bytes, which quality."""
    quieten()
    from fedfstq_hf.federation.mailbox import open_mailbox
    from fedfstq_hf.reporting.status import render_status

    typer.echo(render_status(open_mailbox(mailbox)))
