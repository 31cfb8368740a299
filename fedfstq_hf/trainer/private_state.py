"""Where a client's private state lies: in a folder of its own, from which the Trainer never uploads."""

from __future__ import annotations

from pathlib import Path

from fedfstq_hf.errors import ConfigError, MailboxError
from fedfstq_hf.federation import storage

SUFFIX = ".fedfstq"


def state_folder(state_dir: str | None, output_dir: str) -> Path:
    """`state_dir`, or the folder `OUTPUT_DIR.fedfstq` beside the output folder where none is given.

    A link counts as what it points to, so that the same output folder by another name has the same state.

    Raises:
        ConfigError: nothing lies beside the output folder, as it is the root of the file system.
    """
    if state_dir is not None:
        return Path(state_dir)
    folder = Path(output_dir).resolve()
    if not folder.name:
        raise ConfigError(
            f"No folder can lie beside output_dir={output_dir!r}, to hold this client's private state. Type "
            "FedFSTQConfig(state_dir=FOLDER), or another output_dir."
        )
    return folder.with_name(folder.name + SUFFIX)


def make_state_folder(folder: Path) -> None:
    """Create it where it is missing.

    Raises:
        ConfigError: that cannot be done there.
    """
    try:
        storage.make_folder(folder)
    except MailboxError as error:
        raise ConfigError(
            f"{error} It is for this client's private state: type FedFSTQConfig(state_dir=FOLDER) with another folder."
        ) from error


def check_not_uploaded(state_dir: str | None, output_dir: str) -> None:
    """Refuse a state folder in an output folder that is pushed to the Hub.

    Raises:
        ConfigError: saying what to type.
    """
    if state_dir is None:
        return
    folder, uploaded = Path(state_dir).resolve(), Path(output_dir).resolve()
    if folder.is_relative_to(uploaded):
        raise ConfigError(
            f"state_dir={state_dir!r} lies in output_dir={output_dir!r}, and push_to_hub=True uploads from there: the "
            "state holds the sensitivities of this client's tokens and updates that were not sent. Type "
            f"FedFSTQConfig(state_dir={str(uploaded) + SUFFIX!r}), or leave state_dir out."
        )
