"""The `fedfstq` command. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fedfstq_hf import __version__
from fedfstq_hf.errors import ConfigError, FedFSTQError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Federated LoRA fine-tuning in Fisher-guided messages. Start with: fedfstq simulate quickstart",
)
recipes_app = typer.Typer(no_args_is_help=True, help="List, copy and check recipes.")
app.add_typer(recipes_app, name="recipes")

OVERRIDABLE = {"allow_extra_args": True, "ignore_unknown_options": True}
INTERRUPTED = 130


@app.command(context_settings=OVERRIDABLE)
def simulate(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(help="Name of a shipped recipe, or path of a YAML file.")],
    out: Annotated[Path | None, typer.Option(help="Output folder; runs/RECIPE when not given.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Run a whole federation on this machine, several methods side by side.

    Any key of the recipe can be changed: --model PATH --data FILE --seeds 3 --training.learning_rate 1e-3
    """
    from fedfstq_hf.recipe import load_recipe

    loaded = load_recipe(recipe, parse_overrides(context.args))
    folder = out or Path("runs") / loaded.name
    quieten()
    from fedfstq_hf.simulation.runner import SUMMARY_FILE, Simulation

    command = shlex.join(["fedfstq", "simulate", recipe, *context.args])
    simulation = Simulation(loaded, folder, resume=resume, progress=not quiet, command=command)
    try:
        summary = simulation.run()
    except KeyboardInterrupt:
        typer.echo(f"\nStopped. Go on with: {command} --out {folder} --resume", err=True)
        raise typer.Exit(INTERRUPTED) from None
    from fedfstq_hf.reporting.console import render_summary

    typer.echo(render_summary(summary))
    typer.echo(f"\nReport: {folder / 'report.md'}   figures: {folder / SUMMARY_FILE}   adapter: {folder / 'adapter'}")


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

    from fedfstq_hf.federation.coordinator import found_federation
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


@app.command()
def inspect(message_file: Annotated[Path, typer.Argument(help="A packed message (.safetensors).")]) -> None:
    """What is in a packed message: header, bytes, bits."""
    from fedfstq_hf.codec import message

    if not message_file.is_file():
        raise ConfigError(f"There is no file {message_file}. Messages lie in MAILBOX/updates/ROUND/CLIENT.safetensors.")
    typer.echo(str(message.inspect(message_file.read_bytes())))


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


def parse_overrides(arguments: list[str]) -> dict[str, str]:
    """`["--a.b", "1", "--c=2"]` as `{"a.b": "1", "c": "2"}`.

    Raises:
        ConfigError: an argument is no option, or has no value.
    """
    overrides: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        key = rest.pop(0)
        if not key.startswith("--") or len(key) == 2:
            raise ConfigError(
                f"Cannot make sense of {key!r}; expected --KEY VALUE, such as --training.learning_rate 1e-3."
            )
        name, equals, value = key[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"--{name} needs a value: type --{name} VALUE.")
            value = rest.pop(0)
        overrides[name.replace("-", "_")] = value
    return overrides


def quieten() -> None:
    """Keep libraries' chatter out of the output; our own log goes to stderr."""
    import logging
    import os
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for noisy in ("httpx", "httpx2", "filelock", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    warnings.filterwarnings(
        "ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning
    )  # peft's business
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


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
        typer.secho(f"fedfstq: {error}", fg=typer.colors.RED, err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
