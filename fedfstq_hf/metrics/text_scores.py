"""How alike two texts are: exact match, token F1 and ROUGE-L, in any script, without word lists or downloads."""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from fedfstq_hf.errors import DataError

Score = Callable[[str, str], float]
"""`score(prediction, reference)`, higher is better."""

_ARTICLES = re.compile(r"\b(a|an|the)\b")
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


def mean_of_best(score: Score, predictions: Sequence[str], references: Sequence[str | Sequence[str]]) -> float:
    """Mean over the predictions of the best score against any of a prediction's references.

    Raises DataError where there is no prediction, or a prediction without reference.
    """
    if not len(predictions):
        raise DataError("there are no predictions to score; give at least one pair of prediction and reference")
    total = 0.0
    for prediction, given in zip(predictions, references, strict=True):
        choices = [given] if isinstance(given, str) else given
        if not len(choices):
            raise DataError(f"prediction {prediction[:40]!r} has no reference; expected a text or a list of texts")
        total += max(score(prediction, reference) for reference in choices)
    return total / len(predictions)


def exact_match(prediction: str, reference: str, *, normalize: bool = True) -> float:
    """1.0 where both texts are the same, else 0.0; compared in SQuAD's normal form unless `normalize` is false."""
    if normalize:
        prediction, reference = normalize_answer(prediction), normalize_answer(reference)
    return float(prediction == reference)


def token_f1(prediction: str, reference: str) -> float:
    """Harmonic mean of precision and recall over the bags of normalised tokens, in [0, 1].

    Where one side has no token left, 1.0 if the other has none either, else 0.0 (SQuAD 2.0).
    Source: Rajpurkar et al., arXiv 1606.05250 and 1806.03822.
    """
    given, wanted = answer_tokens(prediction), answer_tokens(reference)
    if not given or not wanted:
        return float(given == wanted)
    common = sum((Counter(given) & Counter(wanted)).values())
    return 2 * common / (len(given) + len(wanted))


class RougeL(NamedTuple):
    """Shares in [0, 1]; `fmeasure` is the harmonic mean of the other two."""

    precision: float
    recall: float
    fmeasure: float


def rouge_l(prediction: str, reference: str) -> RougeL:
    """Longest common subsequence of words, over the prediction's words and over the reference's; 0 where one is empty.

    Sentence-level (`rougeL` of the `rouge_score` package, not `rougeLsum`), no stemming.
    Source: Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004, section 3.1, with beta = 1.
    """
    given, wanted = words(prediction), words(reference)
    common = common_subsequence_length(given, wanted)
    if not common:
        return RougeL(0.0, 0.0, 0.0)
    return RougeL(common / len(given), common / len(wanted), 2 * common / (len(given) + len(wanted)))


def common_subsequence_length(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence: time len(first) x len(second), memory of one row."""
    row = [0] * (len(second) + 1)
    for word in first:
        diagonal = 0
        for column, other in enumerate(second, start=1):
            above = row[column]
            row[column] = diagonal + 1 if word == other else max(above, row[column - 1])
            diagonal = above
    return row[-1]


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
