"""ROUGE-L: how much of two texts' words stand in the same order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .words import words


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
