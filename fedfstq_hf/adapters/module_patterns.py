"""Regular expressions for names of modules that somebody else wrote: a grammar whose matching cannot explode.

PEFT matches `target_modules` and `exclude_modules` with Python's `re`, which backtracks: `(a+)+b` takes time that is
exponential in the name's length. Allowed are characters, `.`, `\\d`, `\\.` and classes such as `[0-9]`, each with `*`,
`+` or `?`, and groups of alternatives, `(q_proj|v_proj)`, that are neither nested nor repeated. The ways to match such
a pattern can be counted from its text, and are bounded.
"""

from __future__ import annotations

import re

MAX_LENGTH = 500
_MAX_WAYS = 64**3  # three of `*` or `+` on a name of 64 characters: about a millisecond a name
_OF_REPEAT = {None: 1, "?": 2, "*": 64, "+": 64}

_ATOM = r"(?:[A-Za-z0-9_-]|\.|\\[.d]|\[(?:[A-Za-z0-9]-[A-Za-z0-9]|[A-Za-z0-9_])+\])"
_PIECE = re.compile(
    rf"(?P<edge>[|^$])|\((?:\?:)?(?P<group>{_ATOM}+(?:\|{_ATOM}+)*)\)(?![*+?{{])"
    rf"|{_ATOM}(?:(?P<repeat>[*+?])\??)?(?![*+{{])"
)
_ATOMS = re.compile(_ATOM)
_DIGITS = frozenset("0123456789")


def is_bounded(pattern: str) -> bool:
    """Whether a pattern lies within the grammar, and has few enough ways to match a name."""
    if len(pattern) > MAX_LENGTH:
        return False
    total, ways, place = 0, 1, 0
    while place < len(pattern):
        piece = _PIECE.match(pattern, place)
        if piece is None:
            return False
        place = piece.end()
        if piece["edge"] == "|":
            total, ways = total + ways, 1
        elif piece["group"]:
            ways *= _branching(piece["group"])
        else:
            ways *= _OF_REPEAT[piece["repeat"]]
    return total + ways <= _MAX_WAYS and _compiles(pattern)


def _compiles(pattern: str) -> bool:
    try:
        re.compile(pattern)
    except re.error:  # such as [z-a]
        return False
    return True


def _branching(group: str) -> int:
    """How many alternatives of a group can match at one place at most."""
    alternatives = [[_characters(atom) for atom in _ATOMS.findall(text)] for text in group.split("|")]
    return max(sum(_agree(one, other) for other in alternatives) for one in alternatives)


def _agree(one: list[frozenset[str] | None], other: list[frozenset[str] | None]) -> bool:
    return all(a is None or b is None or a & b for a, b in zip(one, other, strict=False))


def _characters(atom: str) -> frozenset[str] | None:
    """What an atom matches; None: anything."""
    if atom == ".":
        return None
    if atom == r"\d":
        return _DIGITS
    if not atom.startswith("["):
        return frozenset(atom[-1])
    inner = re.sub(r"(.)-(.)", lambda m: "".join(map(chr, range(ord(m[1]), ord(m[2]) + 1))), atom[1:-1])
    return frozenset(inner)
