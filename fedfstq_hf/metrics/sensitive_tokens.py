"""Token Recall: which of the tokens that matter most to an uncompressed run does a method retain?"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedfstq_hf.errors import ConfigError, DataError, NonFiniteError

DEFAULT_P = 0.1
"""Share of the reference's measured tokens that count as sensitive. Our choice; the paper names no figure."""


def token_recall(
    reference: ArrayLike, *, sensitivities: ArrayLike | None = None, kept: ArrayLike | None = None, p: float = DEFAULT_P
) -> float:
    """Share of the reference's `ceil(p * n)` most sensitive tokens that a method retains, in [0, 1].

    The paper (arXiv 2604.25421) reports Token Recall without defining it; this definition is ours. The n tokens are
    those that the reference measured, ties go to the lower index. With `kept`, retained is what is kept. With
    `sensitivities`, retained are the method's own `ceil(p * n)` most sensitive of the same n tokens: 1.0 for the
    reference itself, about p for a random order. A token that the method never saw is not retained.

    Args:
        reference: (n_tokens,) sensitivities of an uncompressed run, per token id (`TokenSensitivity.scores()`) or per
            position of a text. +inf: never seen, left out.
        sensitivities: (n_tokens,) the method's sensitivities; +inf: never seen.
        kept: (n_tokens,) true (or non-zero) where the method keeps the token. Give this or `sensitivities`.
        p: share in (0, 1]; 0.1 unless given.

    Raises:
        ConfigError: `p` is out of its range, or not just one of `sensitivities` and `kept` is given.
        DataError: the shapes differ, or the reference has measured no token.
        NonFiniteError: a value is NaN or -inf.
    """
    if not 0.0 < p <= 1.0:
        raise ConfigError(f"p is {p!r}; expected a share in (0, 1], such as {DEFAULT_P}")
    if (sensitivities is None) == (kept is None):
        raise ConfigError("token_recall needs either sensitivities=... or kept=..., and not both")
    wanted = _scores("reference", reference)
    given = _scores("sensitivities", sensitivities) if kept is None else np.asarray(kept, dtype=bool)
    if wanted.shape != given.shape or wanted.ndim != 1:
        raise DataError(f"got shapes {wanted.shape} and {given.shape}; expected the same (n_tokens,) twice")
    measured = np.isfinite(wanted)
    if not measured.any():
        raise DataError("the reference has measured no token; give the sensitivities of a run with at least one step")
    # 0.1 * 30 is 3.0000000000000004 in floating point and must not become 4.
    count = math.ceil(p * int(measured.sum()) - 1e-9)
    sensitive = _top(wanted, count)
    retained = np.flatnonzero(given) if kept is not None else _top(np.where(measured, given, np.inf), count)
    return len(np.intersect1d(sensitive, retained)) / count


def _top(scores: NDArray[np.float64], count: int) -> NDArray[np.intp]:
    """Indices of the highest finite scores, at most `count`, ties to the lower index."""
    measured = np.flatnonzero(np.isfinite(scores))
    return measured[np.argsort(-scores[measured], kind="stable")][:count]


def _scores(name: str, values: Any) -> NDArray[np.float64]:
    scores = np.asarray(values, dtype=np.float64)
    if bool(np.isnan(scores).any() | np.isneginf(scores).any()):
        raise NonFiniteError(
            f"{name} holds NaN or -inf; expected sensitivities >= 0, +inf where a token was never seen"
        )
    return scores
