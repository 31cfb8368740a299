"""Text from others, made safe to show in a terminal, a log or a page."""

from __future__ import annotations

import traceback
import unicodedata

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


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
