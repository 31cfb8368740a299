"""Durable files: whole or absent, never half-written.

Every byte that a mailbox or a client session keeps goes through these functions, so that the crash tests can stop a
process before and after each of their system calls.

`below` names a folder that others write to, too: from there on no symbolic link is followed, so that nobody can lead a
reader or a writer to a place of his own choice, and nothing but plain files is opened, so that a pipe holds up nobody.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO

from filelock import lock_descriptor

from fedfstq_hf.errors import MailboxError

logger = logging.getLogger(__name__)

TEMPORARY_PREFIX = ".tmp-"
ASIDE_PREFIX = ".aside-"
LOCK_SECONDS = 10.0
"""Who waits for a lock of a mailbox waits no longer: anybody who may read its file can hold it for ever."""

# Where a system has no such flag, a mailbox can be imported and not opened.
_NOFOLLOW, _NONBLOCK = getattr(os, "O_NOFOLLOW", 0), getattr(os, "O_NONBLOCK", 0)
_CLOEXEC = getattr(os, "O_CLOEXEC", 0)
_FOLDER = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | _CLOEXEC
_FILE = os.O_RDONLY | _NOFOLLOW | _NONBLOCK | getattr(os, "O_NOCTTY", 0) | _CLOEXEC
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK}
_TRIES = 3
_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def checked_name(name: str) -> str:
    """`name`, if it can name a client or an evaluation set in every mailbox.

    Raises:
        MailboxError: it cannot.
    """
    if not _NAME.fullmatch(name):
        raise MailboxError(
            f"{name!r} cannot name a client or an evaluation set: use 1 to 64 letters, digits, '.', '_' or '-', "
            "starting with a letter or a digit."
        )
    return name


def is_name(name: str) -> bool:
    """Whether `checked_name` would accept it."""
    return _NAME.fullmatch(name) is not None


class NotAFileError(OSError):
    """Something else than a plain file lies where one is looked for."""


class TooLargeError(OSError):
    """A file has more bytes, `num_bytes`, than are read."""

    def __init__(self, num_bytes: int, max_bytes: int) -> None:
        super().__init__(errno.EFBIG, f"it has {num_bytes} bytes, more than {max_bytes}")
        self.num_bytes = num_bytes


def temporary_name(target: str) -> str:
    """A name beside `target` that no reader takes for the real one."""
    return f"{TEMPORARY_PREFIX}{target}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


@contextlib.contextmanager
def opened_folder(path: Path, below: Path | None = None) -> Iterator[int]:
    """A descriptor of a folder.

    Raises:
        NotAFileError: below `below`, a part of its path is a symbolic link, or no folder.
        OSError: it cannot be opened.
    """
    descriptor = os.open(path if below is None else below, _FOLDER)
    try:
        for part in () if below is None else path.relative_to(below).parts:
            inner = _opened(part, descriptor)
            os.close(descriptor)
            descriptor = inner
        yield descriptor
    finally:
        os.close(descriptor)


def _opened(name: str, folder: int) -> int:
    try:
        return os.open(name, _FOLDER | _NOFOLLOW, dir_fd=folder)
    except OSError as error:
        if error.errno not in (errno.ENOTDIR, errno.ELOOP):
            raise
        raise NotAFileError(error.errno, f"{name} is a symbolic link, or no folder") from error


def kind(mode: int) -> str | None:
    """What it is that is no plain file, in words; None for a plain file."""
    return None if stat.S_ISREG(mode) else _KINDS.get(stat.S_IFMT(mode), "no file")


def scan(path: Path, below: Path) -> list[tuple[str, os.stat_result]]:
    """What lies in a folder: names, and what they are themselves. Raises `OSError`."""
    found = []
    with opened_folder(path, below) as folder, os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):  # it was removed in this moment
                found.append((entry.name, entry.stat(follow_symlinks=False)))
    return found


def read_file(path: Path, *, max_bytes: int, below: Path) -> bytes:
    """A plain file, whole.

    Raises:
        NotAFileError: it is something else.
        TooLargeError: it has more than `max_bytes` bytes.
        OSError: it cannot be read.
    """
    with opened_folder(path.parent, below) as folder:
        _check_plain(os.stat(path.name, dir_fd=folder, follow_symlinks=False))  # opening a device can do things
        try:
            descriptor = os.open(path.name, _FILE, dir_fd=folder)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            raise NotAFileError(error.errno, "it is a symbolic link, not a file") from error
    with open(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        _check_plain(found)  # it may have been exchanged since
        data = file.read(min(found.st_size, max_bytes) + 1)
    if len(data) > max_bytes:
        raise TooLargeError(max(found.st_size, len(data)), max_bytes)
    return data


def _check_plain(found: os.stat_result) -> None:
    if (what := kind(found.st_mode)) is not None:
        raise NotAFileError(errno.EINVAL, f"it is {what}, not a file")


def make_folder(path: Path, *, durable: bool = True, below: Path | None = None) -> None:
    """Create `path` and its parents where they are missing; below `below`, what lies in their way is set aside."""
    base = path if below is None else below
    missing = [folder for folder in (base, *base.parents) if not folder.is_dir()]
    try:
        if missing:
            base.mkdir(parents=True, exist_ok=True)
        if below is not None:
            _make_below(path.relative_to(below).parts, below, durable)
    except OSError as error:
        raise MailboxError(f"Could not create {path}: {error.strerror or error}.{_hint(error)}") from error
    if durable:
        for folder in missing:
            sync_folder(folder.parent)


def _make_below(parts: tuple[str, ...], below: Path, durable: bool) -> None:
    descriptor = os.open(below, _FOLDER)
    try:
        for part in parts:
            inner = _make_one(part, descriptor, durable)
            os.close(descriptor)
            descriptor = inner
    finally:
        os.close(descriptor)


def _make_one(name: str, folder: int, durable: bool) -> int:
    """A descriptor of a folder in a folder."""
    for _ in range(_TRIES):
        try:
            return _opened(name, folder)
        except FileNotFoundError:
            with contextlib.suppress(FileExistsError):  # somebody else made it in this moment
                os.mkdir(name, dir_fd=folder)
            if durable:
                os.fsync(folder)
        except NotAFileError:
            _set_aside(name, folder)
    return _opened(name, folder)


def sync_folder(folder: Path) -> None:
    """Make the folder's entries (a rename, a link) survive a power cut."""
    try:
        with opened_folder(folder) as descriptor:
            os.fsync(descriptor)
    except OSError as error:
        raise _not_synced(folder, error) from error


def replace_file(path: Path, data: bytes, *, durable: bool = True, below: Path | None = None) -> None:
    """Atomically set the content of `path`: a reader sees the old bytes or the new ones."""
    with _writing(path, below) as (folder, temporary):
        _write_file(temporary, data, folder, durable)
        try:
            os.replace(temporary, path.name, src_dir_fd=folder, dst_dir_fd=folder)
        except IsADirectoryError:
            if below is None:
                raise
            _set_aside(path.name, folder)
            os.replace(temporary, path.name, src_dir_fd=folder, dst_dir_fd=folder)
        _sync(folder, path.parent, durable)


def create_file(path: Path, data: bytes, *, durable: bool = True, below: Path | None = None) -> bool:
    """Atomically create `path`, never overwriting: False if a file of that name is there already.

    On file systems without hard links a lock stands between two writers; where there are no locks either, the second
    one of the same moment would win.
    """
    with _writing(path, below) as (folder, temporary):
        _write_file(temporary, data, folder, durable)
        try:
            os.link(temporary, path.name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            return _rename_to_new(temporary, path, folder, durable, below)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=folder)
        _sync(folder, path.parent, durable)
    return True


def _rename_to_new(temporary: str, path: Path, folder: int, durable: bool, below: Path | None) -> bool:
    with locked(path.with_name(f".{path.name}.lock"), below=below):
        with contextlib.suppress(FileNotFoundError):
            os.stat(path.name, dir_fd=folder, follow_symlinks=False)
            return False
        os.rename(temporary, path.name, src_dir_fd=folder, dst_dir_fd=folder)
    _sync(folder, path.parent, durable)
    return True


def create_folder(path: Path, files: Mapping[str, bytes], *, durable: bool = True, below: Path | None = None) -> bool:
    """Atomically create a folder with its files: False if a non-empty one, or something else, is there already."""
    with _writing(path, below) as (folder, temporary):
        os.mkdir(temporary, dir_fd=folder)
        inside = os.open(temporary, _FOLDER | _NOFOLLOW, dir_fd=folder)
        try:
            for name, data in files.items():
                _write_file(name, data, inside, durable)
            if durable:
                os.fsync(inside)
        finally:
            os.close(inside)
        try:
            # fails on a non-empty target: that is the compare-and-swap
            os.rename(temporary, path.name, src_dir_fd=folder, dst_dir_fd=folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            shutil.rmtree(temporary, dir_fd=folder)
            return False
        _sync(folder, path.parent, durable)
    return True


def set_aside(path: Path, *, below: Path) -> None:
    """Rename what lies where something else must lie; it stays beside it. Raises `MailboxError`."""
    try:
        with opened_folder(path.parent, below) as folder:
            _set_aside(path.name, folder)
    except OSError as error:
        raise MailboxError(f"Could not move {path} out of the way: {error.strerror or error}.") from error


def _set_aside(name: str, folder: int) -> None:
    aside = f"{ASIDE_PREFIX}{name}-{uuid.uuid4().hex[:8]}"
    os.rename(name, aside, src_dir_fd=folder, dst_dir_fd=folder)
    logger.warning("%s lay in the way, and was not what belongs there; it is now named %s.", name, aside)


def remove_leftovers(folder: Path, target: str | None = None, *, below: Path | None = None) -> None:
    """Delete what interrupted writers left in `folder` (of `target` alone, where given). Only for its single writer."""
    pattern = re.compile(f"{re.escape(TEMPORARY_PREFIX)}{re.escape(target) if target else '.+'}-[0-9]+-[0-9a-f]{{8}}")
    with contextlib.suppress(OSError), opened_folder(folder, below) as descriptor:
        for name in os.listdir(descriptor):
            if pattern.fullmatch(name):
                _remove(name, descriptor)


def open_lock(path: Path, *, below: Path | None = None) -> IO[bytes]:
    """Open the file whose lock stands for something; it stays empty."""
    try:
        if below is None:
            return open(path, "ab")
        with opened_folder(path.parent, below) as folder:
            return open(path.name, "ab", opener=_opener(folder, _NOFOLLOW | _NONBLOCK))
    except OSError as error:
        raise MailboxError(f"Could not open {path}: {error.strerror or error}.{_hint(error)}") from error


@contextlib.contextmanager
def locked(path: Path, *, below: Path | None = None) -> Iterator[bool]:
    """Within it, no other process is within it for the same `path`; a killed holder lets go.

    Waits for `LOCK_SECONDS` at most; False where another process held the lock all that time. Where locks are not
    served, the atomic steps alone must do.
    """
    with open_lock(path, below=below) as file:
        yield _lock(file, time.monotonic() + LOCK_SECONDS)


def _lock(file: IO[bytes], until: float) -> bool:
    while True:
        try:
            if lock_descriptor(file.fileno(), blocking=False):
                return True
        except OSError:  # locks are not served here
            return True
        if time.monotonic() > until:
            return False
        time.sleep(0.005)


@contextlib.contextmanager
def _writing(target: Path, below: Path | None) -> Iterator[tuple[int, str]]:
    """A descriptor of the folder to write in, and a name there that is removed when writing fails."""
    temporary = temporary_name(target.name)
    try:
        with opened_folder(target.parent, below) as folder:
            try:
                yield folder, temporary
            except OSError:
                _remove(temporary, folder)
                raise
    except OSError as error:
        raise MailboxError(
            f"Could not write {target}: {error.strerror or error}. Nothing was published.{_hint(error)}"
        ) from error


def _write_file(name: str, data: bytes, folder: int, durable: bool) -> None:
    """Write a file that is not there yet, and whose name nobody reads yet."""
    with open(name, "wb", opener=_opener(folder, os.O_EXCL | _NOFOLLOW)) as file:
        file.write(data)
        if durable:
            file.flush()
            os.fsync(file.fileno())


def _opener(folder: int, extra: int) -> Callable[[str, int], int]:
    return lambda name, flags: os.open(name, flags | extra, 0o666, dir_fd=folder)


def _remove(name: str, folder: int) -> None:
    with contextlib.suppress(OSError):
        if stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
            shutil.rmtree(name, ignore_errors=True, dir_fd=folder)
        else:
            os.unlink(name, dir_fd=folder)


def _sync(folder: int, path: Path, durable: bool) -> None:
    try:
        if durable:
            os.fsync(folder)
    except OSError as error:
        raise _not_synced(path, error) from error


def _not_synced(folder: Path, error: OSError) -> MailboxError:
    return MailboxError(
        f"{folder} was written, but could not be made safe against a power cut: {error.strerror or error}."
        f"{_hint(error)}"
    )


def _hint(error: OSError) -> str:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return " Free some space and start again: nothing was lost." if full else ""
