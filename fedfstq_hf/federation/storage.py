"""Durable files: whole or absent, never half-written.

Every byte that a mailbox or a client session keeps goes through these functions, so that the crash tests can stop a
process before and after each of their system calls.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

from fedfstq_hf.errors import MailboxError

TEMPORARY_PREFIX = ".tmp-"


def temporary_name(target: str) -> str:
    """A name beside `target` that no reader takes for the real one."""
    return f"{TEMPORARY_PREFIX}{target}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


def make_folder(path: Path, *, durable: bool = True) -> None:
    """Create `path` and its parents where they are missing."""
    missing = [folder for folder in (path, *path.parents) if not folder.is_dir()]
    if not missing:
        return
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MailboxError(f"Could not create {path}: {error.strerror or error}.{_hint(error)}") from error
    if durable:
        for folder in missing:
            sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Make the folder's entries (a rename, a link) survive a power cut."""
    try:
        _sync(folder)
    except OSError as error:
        raise MailboxError(
            f"{folder} was written, but could not be made safe against a power cut: {error.strerror or error}."
            f"{_hint(error)}"
        ) from error


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
            _sync(temporary)
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


def remove_leftovers(folder: Path, target: str | None = None) -> None:
    """Delete what interrupted writers left in `folder` (of `target` alone, where given). Only for its single writer."""
    pattern = re.compile(f"{re.escape(TEMPORARY_PREFIX)}{re.escape(target) if target else '.+'}-[0-9]+-[0-9a-f]{{8}}")
    for entry in folder.glob(f"{TEMPORARY_PREFIX}*"):
        if pattern.fullmatch(entry.name):
            _remove(entry)


def open_lock(path: Path) -> IO[bytes]:
    """Open the file whose lock stands for something; it stays empty."""
    try:
        return open(path, "ab")
    except OSError as error:
        raise MailboxError(f"Could not open {path}: {error.strerror or error}.{_hint(error)}") from error


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Within it, no other process is within it for the same `path`. Waits; a killed holder lets go."""
    with open_lock(path) as file:
        with contextlib.suppress(OSError):  # where locks are not served, the atomic steps alone must do
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _cleaned_up(temporary: Path, target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        _remove(temporary)
        raise MailboxError(
            f"Could not write {target}: {error.strerror or error}. Nothing was published.{_hint(error)}"
        ) from error


def _remove(entry: Path) -> None:
    if entry.is_dir():
        shutil.rmtree(entry, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            entry.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _hint(error: OSError) -> str:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return " Free some space and start again: nothing was lost." if full else ""
