"""SQuAD's normal form of an answer, for comparisons that ignore case, punctuation and articles."""

from __future__ import annotations

import re
import string
import unicodedata

from .words import is_unspaced

_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalize_answer(text: str) -> str:
    """Lower case, no punctuation, no English article, single spaces, in that order.

    On ASCII text this is `normalize_answer` of SQuAD's official script. Unicode punctuation is removed as well.
    """
    kept = "".join(char for char in text.lower() if not _is_punctuation(char))
    return " ".join(_ARTICLES.sub(" ", kept).split())


def answer_tokens(text: str) -> list[str]:
    """`normalize_answer` cut at spaces; characters of scripts written without spaces stand alone."""
    return "".join(f" {char} " if is_unspaced(char) else char for char in normalize_answer(text)).split()


def _is_punctuation(char: str) -> bool:
    return char in string.punctuation or unicodedata.category(char).startswith("P")
