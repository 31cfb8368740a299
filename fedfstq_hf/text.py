"""Text for people: what others wrote, made safe to show, and the nearest name to one that is unknown.

JSON and folders that somebody else made, as a mailbox holds them: taken within bounds, or refused.
"""

from __future__ import annotations

import difflib
import errno
import json
import math
import os
import traceback
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fedfstq_hf.errors import FedFSTQError, MailboxError

_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})  # controls, formats (bidi), surrogates, separators


def printable(value: object, limit: int = 200) -> str:
    """`value` as one line of visible text.

    Control characters, terminal escapes, bidirectional marks and lone surrogates are shown as backslash escapes, and
    what is longer than `limit` characters is cut with an ellipsis.
    """
    text = str(value)
    cut = text if len(text) <= limit else text[: limit - 3] + "..."
    return "".join(c if unicodedata.category(c) not in _HIDDEN else _escaped(c) for c in cut)


def printable_traceback(error: BaseException) -> str:
    """Where an error came from, line by line; what others wrote may stand in its message."""
    lines = "".join(traceback.format_exception(error)).splitlines()
    return "\n".join(printable(line) for line in lines)


def nearest(given: object, known: Iterable[str], cutoff: float = 0.5) -> str | None:
    """The known name that `given` was probably meant to be, whatever its case; None where none is like it."""
    by_lower = {name.lower(): name for name in known}
    matches = difflib.get_close_matches(str(given).lower(), by_lower, n=1, cutoff=cutoff)
    return by_lower[matches[0]] if matches else None


def unknown(what: str, given: object, known: Iterable[str], where: str = "") -> str:
    """The text of an error: `unknown codec 'fstk'; did you mean 'fstq'? Known: fp32, fstq.`"""
    names = list(known)
    near = nearest(given, names)
    hint = f"; did you mean {near!r}?" if near else "."
    return f"unknown {what} {given!r}{where}{hint} Known: {', '.join(names) or 'none'}."


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


MAX_DEPTH = 16
"""Deepest nesting of a file that this package writes is 6."""


def parse_object(data: bytes, what: str, *, max_bytes: int, error: type[FedFSTQError] = MailboxError) -> dict[str, Any]:
    """Parse one JSON object.

    Args:
        data: UTF-8 text.
        what: names the file in errors, such as "The mailbox's spec".
        max_bytes: larger files are refused unread.
        error: what is raised where the file is not part of a mailbox.

    Raises:
        error: it is too large, no JSON object, nested deeper than `MAX_DEPTH`, names a key twice, or holds a
            number that is not finite or a whole number beyond 64 bits.
    """
    if len(data) > max_bytes:
        raise error(f"{what} has {len(data)} bytes; expected at most {max_bytes}.")
    try:
        found = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_distinct,
            parse_constant=_no_constant,
            parse_float=_finite,
            parse_int=_bounded,
        )
    except (ValueError, RecursionError) as broken:  # UnicodeDecodeError is a ValueError
        raise error(f"{what} cannot be read: {printable(broken)}") from broken
    if not isinstance(found, dict):
        raise error(f"{what} cannot be read: it is a {type(found).__name__}; expected an object.")
    if _depth(found) > MAX_DEPTH:
        raise error(f"{what} cannot be read: it is nested deeper than {MAX_DEPTH}.")
    return found


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r:.60} stands twice in one object")
        found[key] = value
    return found


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is beyond the largest number")
    return value


def _bounded(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= int(text) < 2**64:
        raise ValueError(f"{text[:40]} has more than 64 bits")
    return int(text)


def _depth(value: object) -> int:
    level, deepest = [value], 0
    while level and deepest <= MAX_DEPTH:
        deepest += 1
        level = [
            child
            for item in level
            if isinstance(item, (dict, list))
            for child in (item.values() if isinstance(item, dict) else item)
            if isinstance(child, (dict, list))
        ]
    return deepest


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
