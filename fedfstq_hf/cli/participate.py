"""Who takes part or looks on: `fedfstq train | status | evaluate | inspect | keys new | keys show`."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated

import typer

from fedfstq_hf.cli.options import (
    INTERRUPTED,
    ONE_SHOT,
    OVERRIDABLE,
    MailboxAddress,
    Patience,
    parse_overrides,
    quieten,
)
from fedfstq_hf.errors import ConfigError

if TYPE_CHECKING:
    from fedfstq_hf.federation.keys import KeyPair

app = typer.Typer()
keys_app = typer.Typer(no_args_is_help=True, help="Make and show the keys that sign messages and open sealed ones.")

_DTYPES = ("float32", "bfloat16")


@app.command(context_settings=OVERRIDABLE)
def train(
    context: typer.Context,
    client_file: Annotated[Path, typer.Argument(help="YAML file with mailbox, client_id and data.path.")],
    yes: Annotated[bool, typer.Option("--yes", help="Take part without being asked, as scripts do.")] = False,
    patience: Patience = ONE_SHOT,
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
        run_client(settings, consent=lambda lines: _ask(lines, yes), patience=patience)
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
def status(mailbox: MailboxAddress, patience: Patience = ONE_SHOT) -> None:
    """Rounds so far: who sent what, how many bytes, which quality."""
    quieten()
    from fedfstq_hf.federation.mailbox.open import open_mailbox
    from fedfstq_hf.reporting.status import render_status

    typer.echo(render_status(open_mailbox(mailbox, patience=patience)))


@app.command(context_settings=OVERRIDABLE)
def evaluate(
    context: typer.Context,
    mailbox: MailboxAddress,
    data: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Held-out examples: a file, a data set of the Hub, or demo."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Base model, where the federation names none on the Hub.")] = None,
    round: Annotated[int | None, typer.Option(help="Round to evaluate; the newest if left out.")] = None,
    source: Annotated[str | None, typer.Option(help="What to call the data; the file's name if left out.")] = None,
    client_id: Annotated[
        str | None, typer.Option(help="Post as this client, who may not write to the federation's own repo.")
    ] = None,
    repo: Annotated[
        str | None, typer.Option(help="Hub repo that this client writes to, where its settings name one.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples per forward pass.")] = 16,
    dtype: Annotated[str, typer.Option(help="Of the base model: float32 or bfloat16.")] = "float32",
) -> None:
    """Measure a published adapter on held-out examples, and post what came out: status and card show it.

    Which columns of the examples are read is your choice: prompt and answer, or others with --data.format fed_med
    """
    overrides = parse_overrides(context.args)
    changes = {name.removeprefix("data."): value for name, value in overrides.items() if name.startswith("data.")}
    if unknown := [name for name in overrides if not name.startswith("data.")]:
        raise ConfigError(f"There is no option --{unknown[0]}. Keys of the data section begin with --data.")
    if repo is not None and client_id is None:
        raise ConfigError("--repo is a client's own: type --client-id too, or leave it out.")
    if dtype not in _DTYPES:
        raise ConfigError(f"--dtype must be one of {', '.join(_DTYPES)}, not {dtype!r}.")
    if data is not None:
        changes["path"] = data
    quieten()
    from fedfstq_hf.federation.mailbox.open import open_mailbox
    from fedfstq_hf.federation.storage import checked_name
    from fedfstq_hf.recipe import apply_overrides
    from fedfstq_hf.running.evaluate import measure
    from fedfstq_hf.running.serve import make_coordinator, open_federation

    box, spec = open_federation(mailbox)
    name = checked_name(source or _source_name(changes.get("path", "data")))
    section = apply_overrides({}, {f"data.{key}": value for key, value in changes.items()}).get("data", {})
    measured = measure(box, spec, section, model=model, round=round, batch_size=batch_size, dtype=dtype)
    poster = box if repo is None else open_mailbox(mailbox, client_repo=repo)
    poster.post_metric(measured.round, name, measured.metrics, client_id=client_id)
    values = ", ".join(f"{metric} {value:.4f}" for metric, value in measured.metrics.items())
    typer.echo(f"round {measured.round}, {measured.num_examples} examples of {name}: {values}")
    if client_id is None:
        make_coordinator(mailbox, reads_messages=False, publishes=False)  # which renews the card


def _source_name(path: str) -> str:
    stem = PurePosixPath(path.rstrip("/")).name.removesuffix(".jsonl")
    return re.sub(r"^[^A-Za-z0-9]+|[^A-Za-z0-9._-]+", "-", stem).strip("-")[:64] or "data"


@app.command()
def inspect(message_file: Annotated[Path, typer.Argument(help="A packed message (.safetensors).")]) -> None:
    """What is in a packed message: header, bytes, bits."""
    from fedfstq_hf.codec import message

    if not message_file.is_file():
        raise ConfigError(f"There is no file {message_file}. Messages lie in MAILBOX/updates/ROUND/CLIENT.safetensors.")
    typer.echo(str(message.inspect(message_file.read_bytes())))


@keys_app.command("new")
def keys_new(path: Annotated[Path, typer.Argument(help="Key file to write; must not exist. Never share it.")]) -> None:
    """Make a private key file and print its public keys."""
    from fedfstq_hf.federation import key_files, keys

    pair = keys.new_keypair()
    public = _describe(pair)
    key_files.save_keypair(path, pair)
    typer.echo(f"Wrote {path}. Keep it, and keep it to yourself. The public keys:\n{public}")


@keys_app.command("show")
def keys_show(path: Annotated[Path, typer.Argument(help="Key file that `fedfstq keys new` wrote.")]) -> None:
    """Print the public keys of a key file."""
    from fedfstq_hf.federation import key_files

    typer.echo(_describe(key_files.load_signing_key(path)))


def _describe(pair: KeyPair) -> str:
    return f"{pair.verify_key}  checks signatures\n{pair.seal_key}  seals messages to the holder"
