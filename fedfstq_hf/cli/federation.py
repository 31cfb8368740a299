"""A federation's life: `fedfstq init | serve | train | status`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedfstq_hf.cli.options import INTERRUPTED, OVERRIDABLE, parse_overrides, quieten
from fedfstq_hf.errors import ConfigError

app = typer.Typer()


@app.command(context_settings=OVERRIDABLE)
def init(
    context: typer.Context,
    mailbox: Annotated[str, typer.Argument(help="Address of the new federation: a folder.")],
    recipe: Annotated[str, typer.Option(help="Recipe that says model, adapter, training and rounds.")],
    method: Annotated[str, typer.Option(help="Which of the recipe's methods to run.")] = "fstq",
    min_clients: Annotated[
        int | None, typer.Option(help="Updates that close a round; clients_per_round when not given.")
    ] = None,
    round_seconds: Annotated[
        float | None, typer.Option(help="Close a round after this time even with fewer updates.")
    ] = None,
) -> None:
    """Found a federation: publish round 0 (adapter and spec) into a mailbox."""
    from fedfstq_hf.recipe import load_recipe

    loaded = load_recipe(recipe, parse_overrides(context.args))
    if method not in loaded.methods:
        raise ConfigError(
            f"The recipe has no method {method!r}; it has {', '.join(loaded.methods)}. Type --method NAME."
        )
    quieten()
    import dataclasses

    from fedfstq_hf.federation.founding import found_federation
    from fedfstq_hf.federation.mailbox import open_mailbox
    from fedfstq_hf.founding import found, make_spec

    founding = found(loaded, loaded.seeds[0])
    count = loaded.federation.clients_per_round if min_clients is None else min_clients
    spec = make_spec(loaded, method, founding, seed=loaded.seeds[0], min_clients=count)
    spec = dataclasses.replace(spec, round_seconds=round_seconds)
    record = found_federation(open_mailbox(mailbox), spec, founding.adapter, founding.adapter_config)
    typer.echo(
        f"Founded {loaded.name} in {mailbox}: {founding.view.schema.num_params:,} adapter parameters "
        f"({record.adapter_bytes:,} bytes), codec {spec.codec}, {spec.rounds} rounds of {spec.local_steps} local "
        f"steps, {spec.min_clients} updates a round.\nNext: fedfstq serve {mailbox}"
    )


@app.command()
def serve(
    mailbox: Annotated[str, typer.Argument(help="Address of a federation.")],
    once: Annotated[
        bool, typer.Option("--once", help="Close the rounds that are ready, then exit (for cron).")
    ] = False,
    poll_seconds: Annotated[float, typer.Option(help="Seconds between two looks at the mailbox.")] = 2.0,
) -> None:
    """Coordinate a federation until it ends. Needs neither GPU nor base model; stop and restart it at any time."""
    quieten()
    from fedfstq_hf.federation.coordinator import Coordinator
    from fedfstq_hf.federation.mailbox import open_mailbox
    from fedfstq_hf.reporting.status import describe_round

    coordinator = Coordinator(open_mailbox(mailbox))
    typer.echo(describe_round(coordinator.record, coordinator.spec))
    try:
        last = coordinator.serve(
            poll_seconds=poll_seconds,
            once=once,
            on_round=lambda record: typer.echo(describe_round(record, coordinator.spec)),
        )
    except KeyboardInterrupt:
        typer.echo(f"\nStopped. Go on with: fedfstq serve {mailbox}", err=True)
        raise typer.Exit(INTERRUPTED) from None
    if last.finished:
        typer.echo(f"Finished. Load it with: PeftModel.from_pretrained(base, {mailbox!r})")


@app.command(context_settings=OVERRIDABLE)
def train(
    context: typer.Context,
    client_file: Annotated[Path, typer.Argument(help="YAML file with mailbox, client_id and data.path.")],
) -> None:
    """Take part in a federation as one client. Stop and restart it at any time.

    Any key of the file can be changed: --client_id c2 --data.path mine.jsonl --training.per_device_train_batch_size 2
    """
    from fedfstq_hf.client_file import load_client_file

    settings = load_client_file(client_file, parse_overrides(context.args))
    quieten()
    from fedfstq_hf.running_client import run_client

    try:
        run_client(settings)
    except KeyboardInterrupt:
        typer.echo(f"\nStopped. Go on with: fedfstq train {client_file}", err=True)
        raise typer.Exit(INTERRUPTED) from None


@app.command()
def status(mailbox: Annotated[str, typer.Argument(help="Address of a federation.")]) -> None:
    """Rounds so far: who sent what, how many bytes, which quality."""
    quieten()
    from fedfstq_hf.federation.mailbox import open_mailbox
    from fedfstq_hf.reporting.status import render_status

    typer.echo(render_status(open_mailbox(mailbox)))
