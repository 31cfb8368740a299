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


FISHER_SOURCES = ("gradients", "adam")
"""`gradients`: a moving average of their squares, before clipping. `adam`: the optimizer's own second moments, which
cost nothing, are those of clipped gradients and look further back."""
FISHER_OBJECTIVES = ("same", "filtered-only")
"""`same`: the gradients that the optimizer sees. `filtered-only`: those of the filtered objective, while the optimizer
sees the full one; costs a second backward pass at refresh steps, which are then the only ones that enter."""


def check_fisher(fisher: object, fisher_objective: object, objective: object, proximal_mu: object) -> None:
    """Refuse sources of Fisher information that do not exist, and combinations that would not mean what they say.

    Raises:
        ConfigError: saying what to type.
    """
    if fisher not in FISHER_SOURCES:
        raise ConfigError(f"fisher must be one of {', '.join(FISHER_SOURCES)}, not {fisher!r}.")
    if fisher_objective not in FISHER_OBJECTIVES:
        raise ConfigError(f"fisher_objective must be one of {', '.join(FISHER_OBJECTIVES)}, not {fisher_objective!r}.")
    mu = proximal_mu
    if isinstance(mu, bool) or not isinstance(mu, (int, float)) or not 0 <= mu < math.inf:
        raise ConfigError(f"proximal_mu must be a number of at least 0 (0 switches it off), not {proximal_mu!r}.")
    if fisher == "adam" and fisher_objective == "filtered-only":
        raise ConfigError("fisher='adam' has seen what the optimizer saw. Use fisher_objective='same'.")
    if fisher == "adam" and mu:
        raise ConfigError("fisher='adam' would hold the proximal term. Use fisher='gradients' or proximal_mu=0.")
    if fisher_objective == "filtered-only" and objective == "full":
        raise ConfigError(
            "fisher_objective='filtered-only' needs a filter: set objective to 'hard', 'soft' or 'unbiased'."
        )
