"""Exact match of two answers."""

from __future__ import annotations

from .normalize import normalize_answer


def exact_match(prediction: str, reference: str, *, normalize: bool = True) -> float:
    """1.0 where both texts are the same, else 0.0; compared in SQuAD's normal form unless `normalize` is false."""
    if normalize:
        prediction, reference = normalize_answer(prediction), normalize_answer(reference)
    return float(prediction == reference)
