"""`fedfstq evaluate`."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Annotated

import typer

from fedfstq_hf.cli.options import OVERRIDABLE, parse_overrides, quieten
from fedfstq_hf.errors import ConfigError

app = typer.Typer()

_DTYPES = ("float32", "bfloat16")


@app.command(context_settings=OVERRIDABLE)
def evaluate(
    context: typer.Context,
    mailbox: Annotated[str, typer.Argument(help="Address of a federation: hf://ORG/REPO or a folder.")],
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
    from fedfstq_hf.federation.mailbox import checked_name, open_mailbox
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
