"""Text for people: what others wrote, made safe to show, and the nearest name to one that is unknown."""

from __future__ import annotations

import difflib
import traceback
import unicodedata
from collections.abc import Iterable

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
