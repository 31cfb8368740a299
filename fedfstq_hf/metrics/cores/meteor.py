"""METEOR without synonyms: exact words, then stems. Works without WordNet, hence without a download."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise

from .porter import stem
from .words import words

_ALPHA, _GAMMA = 0.9, 0.5
"""Weights of recall and of the penalty: those of Lavie and Agarwal 2007, and NLTK's defaults."""

Numbered = list[tuple[int, str]]
"""(position in its text, word or stem)."""


def meteor(prediction: str, reference: str) -> float:
    """Score in [0, 1]: `(1 - 0.5 (chunks / matches)^3) * P R / (0.9 P + 0.1 R)`; 0 where no word matches.

    P and R are the shares of the prediction's and the reference's words that match. Words match exactly or else by
    their Porter stem; the third stage, WordNet synonyms, is left out, so the score is at most METEOR's in practice.
    Repeated words are aligned from the end of the text, as NLTK does it. Words are those of `words.py`: punctuation
    does not count.
    Source: Lavie and Agarwal, "METEOR: An Automatic Metric for MT Evaluation", 2007.
    """
    given, wanted = list(enumerate(words(prediction))), list(enumerate(words(reference)))
    if not given or not wanted:
        return 0.0
    exact, given_left, wanted_left = _match(given, wanted)
    by_stem, _, _ = _match(_stems(given_left), _stems(wanted_left))
    pairs = sorted(exact + by_stem)
    if not pairs:
        return 0.0
    precision, recall = len(pairs) / len(given), len(pairs) / len(wanted)
    mean = precision * recall / (_ALPHA * precision + (1 - _ALPHA) * recall)
    fragmentation = _chunks(pairs) / len(pairs)
    return mean * (1 - _GAMMA * fragmentation**3)


def _stems(numbered: Numbered) -> Numbered:
    return [(position, stem(word)) for position, word in numbered]


def _match(given: Numbered, wanted: Numbered) -> tuple[list[tuple[int, int]], Numbered, Numbered]:
    """Pairs of positions of equal words, last with last, and what is left of both sides."""
    places: dict[str, list[int]] = defaultdict(list)
    for position, word in wanted:
        places[word].append(position)
    pairs, left = [], []
    for position, word in reversed(given):
        if places[word]:
            pairs.append((position, places[word].pop()))
        else:
            left.append((position, word))
    taken = {position for _, position in pairs}
    return pairs, left[::-1], [item for item in wanted if item[0] not in taken]


def _chunks(pairs: list[tuple[int, int]]) -> int:
    """Runs of matches that are neighbours in both texts."""
    return 1 + sum(after != (before[0] + 1, before[1] + 1) for before, after in pairwise(pairs))
