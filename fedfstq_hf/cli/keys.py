"""`fedfstq keys new | show`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fedfstq_hf.federation.keys import KeyPair

app = typer.Typer(no_args_is_help=True, help="Make and show the keys that sign messages and open sealed ones.")


@app.command("new")
def keys_new(path: Annotated[Path, typer.Argument(help="Key file to write; must not exist. Never share it.")]) -> None:
    """Make a private key file and print its public keys."""
    from fedfstq_hf.federation import key_files, keys

    pair = keys.new_keypair()
    public = _describe(pair)
    key_files.save_keypair(path, pair)
    typer.echo(f"Wrote {path}. Keep it, and keep it to yourself. The public keys:\n{public}")


@app.command("show")
def keys_show(path: Annotated[Path, typer.Argument(help="Key file that `fedfstq keys new` wrote.")]) -> None:
    """Print the public keys of a key file."""
    from fedfstq_hf.federation import key_files

    typer.echo(_describe(key_files.load_signing_key(path)))


def _describe(pair: KeyPair) -> str:
    return f"{pair.verify_key}  checks signatures\n{pair.seal_key}  seals messages to the holder"
