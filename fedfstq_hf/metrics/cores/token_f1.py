"""Token F1 of two answers, as in SQuAD."""

from __future__ import annotations

from collections import Counter

from .normalize import answer_tokens


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
