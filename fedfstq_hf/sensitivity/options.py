"""Names and ranges of what a client's local training may optimise; imports no torch, so that settings check at once."""

from __future__ import annotations

import math

from ..errors import ConfigError

OBJECTIVES = ("full", "hard", "soft", "unbiased")
"""`full`: all target tokens. `hard`: the most sensitive ones (the paper's mask). `soft`: all, weighted by sensitivity.
`unbiased`: a sample that favours sensitive tokens, weighted so that the full gradient is its expectation."""


def check_objective(objective: object, token_keep_ratio: object) -> None:
    """Refuse objectives that do not exist and shares outside (0, 1].

    Raises:
        ConfigError: saying what to type.
    """
    if objective not in OBJECTIVES:
        raise ConfigError(f"objective must be one of {', '.join(OBJECTIVES)}, not {objective!r}.")
    ratio = token_keep_ratio
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 < ratio <= 1 or math.isnan(ratio):
        raise ConfigError(
            f"token_keep_ratio is the share of target tokens that is kept: above 0 and at most 1 (0.5 keeps half), not "
            f"{token_keep_ratio!r}."
        )
