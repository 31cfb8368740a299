"""Durable files: whole or absent, never half-written.

Every byte that a mailbox or a client session keeps goes through these functions, so that the crash tests can stop a
process before and after each of their system calls.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

from fedfstq_hf.errors import MailboxError

TEMPORARY_PREFIX = ".tmp-"


def temporary_name(target: str) -> str:
    """A name beside `target` that no reader takes for the real one."""
    return f"{TEMPORARY_PREFIX}{target}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


def sync_folder(folder: Path) -> None:
    """Make the folder's entries (a rename, a link) survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Write `data` to a path that nobody reads yet; fsync when `durable`."""
    with open(path, "wb") as file:
        file.write(data)
        if durable:
            file.flush()
            os.fsync(file.fileno())


def replace_file(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Atomically set the content of `path`: a reader sees the old bytes or the new ones."""
    temporary = path.with_name(temporary_name(path.name))
    with _cleaned_up(temporary, path):
        write_file(temporary, data, durable=durable)
        os.replace(temporary, path)
    if durable:
        sync_folder(path.parent)


def create_file(path: Path, data: bytes, *, durable: bool = True) -> bool:
    """Atomically create `path`, never overwriting: False if a file of that name is there already."""
    temporary = path.with_name(temporary_name(path.name))
    with _cleaned_up(temporary, path):
        write_file(temporary, data, durable=durable)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        finally:
            temporary.unlink()
    if durable:
        sync_folder(path.parent)
    return True


def create_folder(path: Path, files: Mapping[str, bytes], *, durable: bool = True) -> bool:
    """Atomically create a folder with its files: False if a non-empty one of that name is there already."""
    temporary = path.with_name(temporary_name(path.name))
    with _cleaned_up(temporary, path):
        temporary.mkdir()
        for name, data in files.items():
            write_file(temporary / name, data, durable=durable)
        if durable:
            sync_folder(temporary)
        try:
            os.rename(temporary, path)  # fails on a non-empty target: that is the compare-and-swap
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            shutil.rmtree(temporary)
            return False
    if durable:
        sync_folder(path.parent)
    return True


def remove_leftovers(folder: Path) -> None:
    """Delete what interrupted writers left in `folder`. Only for the folder's single writer."""
    for entry in folder.glob(f"{TEMPORARY_PREFIX}*"):
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


@contextlib.contextmanager
def _cleaned_up(temporary: Path, target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        hint = " Free some space and start again: nothing was lost." if error.errno == errno.ENOSPC else ""
        raise MailboxError(f"Could not write {target}: {error.strerror or error}. Nothing was published.{hint}") from error
