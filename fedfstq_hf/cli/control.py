"""What may change between rounds: `fedfstq pause | resume | enrol`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedfstq_hf.errors import ConfigError

if TYPE_CHECKING:
    from fedfstq_hf.federation.control import Control

app = typer.Typer()

_Mailbox = Annotated[str, typer.Argument(help="Address of a federation: hf://ORG/REPO or a folder.")]


@app.command()
def pause(
    mailbox: _Mailbox, reason: Annotated[str, typer.Option(help="Why: clients and `fedfstq status` show it.")] = ""
) -> None:
    """Close no more rounds until `fedfstq resume`. Clients may still send what they are training."""
    from fedfstq_hf.federation import control

    changed = _change(mailbox, control.pause(reason))
    typer.echo(f"Paused {mailbox}: {changed.paused}. Go on with: fedfstq resume {mailbox}")


@app.command()
def resume(mailbox: _Mailbox) -> None:
    """Let rounds be closed again."""
    from fedfstq_hf.federation import control

    _change(mailbox, control.resume)
    typer.echo(f"{mailbox} goes on.")


@app.command()
def enrol(
    mailbox: _Mailbox,
    clients: Annotated[list[str], typer.Argument(metavar="CLIENT...", help="Names of clients.")],
    repo: Annotated[str | None, typer.Option(help="Hub repo, ORG/NAME, that its messages are read from.")] = None,
    account: Annotated[str | None, typer.Option(help="Hub account that opens the client's pull request.")] = None,
    verify_key: Annotated[
        str | None, typer.Option(help="The client's ed25519: public key: `fedfstq keys show` prints it.")
    ] = None,
    max_examples: Annotated[int | None, typer.Option(help="Count the client as at most that many examples.")] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Take the clients off the list.")] = False,
) -> None:
    """Let clients take part, change what is known of them, or take them off the list."""
    from fedfstq_hf.federation import control

    own = {"repo": repo, "account": account, "verify_key": verify_key}
    fields = {name: value for name, value in {**own, "max_examples": max_examples}.items() if value is not None}
    if remove and fields:
        raise ConfigError(f"--remove takes clients off the list: leave --{next(iter(fields)).replace('_', '-')} out.")
    if given := [name.replace("_", "-") for name, value in own.items() if value is not None and len(clients) > 1]:
        raise ConfigError(f"--{given[0]} is one client's own; enrol {', '.join(clients)} one by one.")
    changed = _change(mailbox, _removal(clients) if remove else control.enrol(clients, **fields))
    enrolled = changed.clients or {}
    typer.echo(f"Enrolled are now {len(enrolled)}: {', '.join(sorted(enrolled)) or 'none'}. All others are refused.")


def _removal(clients: list[str]) -> Callable[[Control], Control]:
    from fedfstq_hf.federation.control import dismiss

    def change(control: Control) -> Control:
        for client in clients:
            control = dismiss(client)(control)
        return control

    return change


def _change(address: str, change: Callable[[Any], Any]) -> Control:
    """Change the control file of a federation that is there and goes on."""
    from fedfstq_hf.federation.control import change_control
    from fedfstq_hf.running.serve import open_federation

    mailbox, _ = open_federation(address)
    return change_control(mailbox, change)
