"""From one pair of texts to a list of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fedfstq_hf.errors import DataError

Score = Callable[[str, str], float]
"""`score(prediction, reference)`, higher is better."""


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
