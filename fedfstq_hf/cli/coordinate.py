"""Closing rounds: `fedfstq serve | stop | rollback`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedfstq_hf.cli.options import INTERRUPTED, quieten

app = typer.Typer()

_Mailbox = Annotated[str, typer.Argument(help="Address of a federation: hf://ORG/REPO or a folder.")]
_Key = Annotated[
    Path | None, typer.Option(metavar="KEYFILE", help="Key file that opens sealed messages and signs records.")
]


@app.command()
def serve(
    mailbox: _Mailbox,
    once: Annotated[
        bool, typer.Option("--once", help="Close the rounds that are ready, then exit (for cron).")
    ] = False,
    poll_seconds: Annotated[
        float, typer.Option(help="Seconds between two looks at the mailbox; they grow rarer while nothing happens.")
    ] = 2.0,
    key: _Key = None,
) -> None:
    """Coordinate a federation until it ends. Needs neither GPU nor base model; stop and restart it at any time."""
    quieten()
    from fedfstq_hf.reporting.status import describe_round
    from fedfstq_hf.running.serve import make_coordinator
    from fedfstq_hf.text import printable

    coordinator = make_coordinator(mailbox, key_file=key)
    typer.echo(describe_round(coordinator.record, coordinator.spec))
    try:
        last = coordinator.serve(
            poll_seconds=poll_seconds,
            once=once,
            on_round=lambda record: typer.echo(describe_round(record, coordinator.spec)),
        )
    except KeyboardInterrupt:
        typer.echo(f"\nStopped. Go on with: fedfstq serve {mailbox}{f' --key {key}' if key else ''}", err=True)
        raise typer.Exit(INTERRUPTED) from None
    if last.finished:
        _say_finished(mailbox)
    elif once and coordinator.paused is not None:
        typer.echo(f"Paused: {printable(coordinator.paused)}. Go on with: fedfstq resume {mailbox}")


@app.command()
def stop(mailbox: _Mailbox, key: _Key = None) -> None:
    """End a federation now: what has arrived is used, and the round made from it is the last one."""
    quieten()
    from fedfstq_hf.reporting.status import describe_round
    from fedfstq_hf.running.serve import make_coordinator

    coordinator = make_coordinator(mailbox, key_file=key)
    typer.echo(describe_round(coordinator.stop(), coordinator.spec))
    _say_finished(mailbox)


@app.command()
def rollback(
    mailbox: _Mailbox,
    round: Annotated[int, typer.Argument(help="Round whose adapter to go back to.")],
    key: _Key = None,
) -> None:
    """Publish an earlier round's adapter as the next round; updates that wait are refused, and clients keep them."""
    quieten()
    from fedfstq_hf.reporting.status import describe_round
    from fedfstq_hf.running.serve import make_coordinator

    coordinator = make_coordinator(mailbox, key_file=key, reads_messages=False)
    typer.echo(describe_round(coordinator.rollback(round), coordinator.spec))


def _say_finished(mailbox: str) -> None:
    address = mailbox.removeprefix("hf://")
    typer.echo(f"Finished. Load it with: PeftModel.from_pretrained(base, {address!r})")
