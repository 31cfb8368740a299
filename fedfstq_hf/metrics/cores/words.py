"""Words of a text in any script, without word lists or downloads."""

from __future__ import annotations

import unicodedata

# Scripts written without spaces: each character stands for itself, as in MLQA's evaluation of Chinese.
_UNSPACED = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Burmese
    (0x1780, 0x17FF),  # Khmer
    (0x3040, 0x30FF),  # Hiragana, Katakana
    (0x3400, 0x4DBF),  # CJK, extension A
    (0x4E00, 0x9FFF),  # CJK
    (0xF900, 0xFAFF),  # CJK, compatibility
    (0x20000, 0x323AF),  # CJK, further extensions
)


def words(text: str) -> list[str]:
    """Lower-cased runs of letters, digits and combining marks; anything else separates.

    On ASCII text these are the words of the `rouge_score` package (without stemming). That package drops every letter
    outside a-z; here other scripts count, and characters of scripts written without spaces are words of their own.
    """
    found: list[str] = []
    run = ""
    for char in text.lower():
        kind = unicodedata.category(char)[0]
        if kind == "M" and run == "" and found and is_unspaced(found[-1][0]):
            found[-1] += char
        elif kind in "LNM" and not is_unspaced(char):
            run += char
        else:
            if run:
                found.append(run)
                run = ""
            if kind in "LN":
                found.append(char)
    return [*found, run] if run else found


def is_unspaced(char: str) -> bool:
    """Whether a character belongs to a script that is written without spaces between words."""
    point = ord(char)
    return any(first <= point <= last for first, last in _UNSPACED)
