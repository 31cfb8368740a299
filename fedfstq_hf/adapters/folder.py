"""Files of a folder that somebody else made: regular ones that lie in it, and no more of them than is asked for."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from fedfstq_hf.errors import FedFSTQError


def file_in(folder: Path, name: str, error: type[FedFSTQError]) -> Path | None:
    """Where a file of a folder really lies; None where there is no such file.

    Symbolic links are followed within the folder, and from a snapshot in the Hub's cache to its blobs.

    Raises:
        error: a link leads elsewhere, so that a file of this machine would be taken for the folder's.
    """
    path, home = folder / name, folder.resolve()
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError):  # the latter for links in a circle
        return None
    cached = home.parent.name == "snapshots" and real.parent == home.parent.parent / "blobs"
    if not real.is_relative_to(home) and not cached:
        raise error(f"{path} is a link to {real}, outside of the folder. Put a copy of the file in its place.")
    return real if real.is_file() else None


def read_in(folder: Path, name: str, max_bytes: int, error: type[FedFSTQError], expected: str) -> bytes:
    """One file of a folder.

    Args:
        folder: where it is.
        name: of the file.
        max_bytes: that it can have.
        error: what is raised.
        expected: the folder that is asked for, in words.

    Raises:
        error: it is missing, lies elsewhere, cannot be read, or has more than `max_bytes`.
    """
    path = file_in(folder, name, error)
    try:
        if path is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as broken:
        raise error(f"{folder / name} cannot be read ({broken.strerror or broken}); expected {expected}.") from broken
    if len(data) > max_bytes:
        raise error(f"{folder / name} has more than the {max_bytes} bytes that can belong to this adapter.")
    return data
