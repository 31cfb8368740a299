"""`fedfstq inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedfstq_hf.errors import ConfigError

app = typer.Typer()


@app.command()
def inspect(message_file: Annotated[Path, typer.Argument(help="A packed message (.safetensors).")]) -> None:
    """What is in a packed message: header, bytes, bits."""
    from fedfstq_hf.codec import message

    if not message_file.is_file():
        raise ConfigError(f"There is no file {message_file}. Messages lie in MAILBOX/updates/ROUND/CLIENT.safetensors.")
    typer.echo(str(message.inspect(message_file.read_bytes())))
