"""Switches of methods that are more than a codec: their ranges. Imports no torch, so that settings check at once."""

from __future__ import annotations

import math
from typing import Protocol

from fedfstq_hf.errors import ConfigError


class Switches(Protocol):
    """What a recipe's method and a federation's spec have in common beside objective and server optimizer."""

    @property
    def codec(self) -> str:
        """Of the method's messages."""

    @property
    def fisher(self) -> str:
        """Source of the adapter's Fisher information."""

    @property
    def learned_binarisation(self) -> bool:
        """FedBAT: train the update in binary form, with a learned step size per tensor."""

    @property
    def binarisation_warmup(self) -> float:
        """Share of the local steps before it, in full precision (phi in the paper)."""

    @property
    def binarisation_rho(self) -> float:
        """How fast step sizes are learned (rho in the paper)."""

    @property
    def token_merge_ratio(self) -> float:
        """Fed-ToMe: share of the prompt's tokens that local training merges into similar ones."""

    @property
    def token_merge_layer(self) -> int:
        """The decoder block before which they are merged, counted from 0."""


def check_switches(given: Switches, *, scaffold: bool) -> None:
    """Refuse values out of range, and combinations that would not mean what they say.

    Args:
        scaffold: whether gradients are corrected by control variates.

    Raises:
        ConfigError: saying what to type.
    """
    _check_number("binarisation_warmup", given.binarisation_warmup, 1, "the share of local steps in full precision")
    _check_number("binarisation_rho", given.binarisation_rho, 1000, "6 in the paper, 0 learns no step sizes")
    _check_number("token_merge_ratio", given.token_merge_ratio, 0.5, "0 switches it off")
    if given.learned_binarisation and given.codec != "fedbat":
        raise ConfigError(
            f"learned_binarisation needs codec 'fedbat', which sends what it learns, not {given.codec!r}."
        )
    if given.fisher == "adam" and (scaffold or given.learned_binarisation):
        raise ConfigError(
            "fisher='adam' would be of gradients that SCAFFOLD or FedBAT has changed. Use fisher='gradients'."
        )
    layer = given.token_merge_layer
    if type(layer) is not int or layer < 0:
        raise ConfigError(f"token_merge_layer must be the number of a decoder block, counted from 0, not {layer!r}.")


def check_freeze_a(freeze_a: bool, *, scaffold: bool, learned_binarisation: bool) -> None:
    """Refuse what is defined over the whole adapter together with factors that stay at home.

    Raises:
        ConfigError: naming both.
    """
    other = "scaffold" if scaffold else "learned_binarisation" if learned_binarisation else None
    if freeze_a and other:
        raise ConfigError(f"freeze_a and {other} cannot be combined: leave one of them out.")


def check_coverage(coverage: object, *, scaffold: bool) -> None:
    """Refuse a share of the tensors out of range, and together with control variates, which are of all of them.

    Raises:
        ConfigError: saying what to type.
    """
    valid = isinstance(coverage, (int, float)) and not isinstance(coverage, bool)
    if not valid or not 0 < coverage <= 1:  # type: ignore[operator]
        raise ConfigError(f"coverage must be a share of the tensors above 0 and at most 1 (all), not {coverage!r}.")
    if scaffold and coverage != 1:
        raise ConfigError("coverage and scaffold cannot be combined: leave one of them out.")


WEIGHTS = ("examples", "uniform", "bytes", "precision")
"""What an update weighs in the mean: its examples (FedAvg), as much as every other, the size of its message, or its
examples and less where its message is noisy (`federation.weights`)."""


def check_weights(weights: object, *, scaffold: bool, coverage: float) -> None:
    """Refuse weights that are not among `WEIGHTS`, and what the other two do not go together with.

    Control variates are a plain mean, and where messages are about different tensors their norms cannot be compared.

    Raises:
        ConfigError: saying what to type.
    """
    if weights not in WEIGHTS:
        raise ConfigError(f"weights must be one of {', '.join(WEIGHTS)}, not {weights!r}.")
    if scaffold and weights in ("bytes", "precision"):
        raise ConfigError("With scaffold all clients weigh alike: leave out weights, or say uniform.")
    if coverage != 1 and weights == "precision":
        raise ConfigError(
            "weights: precision compares messages by their norms, and with coverage below 1 those are of different "
            "tensors: leave one of them out."
        )


def check_refinement(
    refinement_budget: object,
    preview_step: object,
    preview_correction: object,
    preview_rounds: object,
    *,
    error_feedback: float,
    scaffold: bool,
    coverage: float,
) -> None:
    """Refuse shares and numbers of rounds out of range, and what does not go together with second messages of a round.

    A preview leaves out what its refinement says: nothing is left for a residual. Control variates travel as second
    payloads already; and with coverage below 1 the means of different tensors would have to be kept apart.

    Raises:
        ConfigError: saying what to type.
    """
    valid = isinstance(preview_step, (int, float)) and not isinstance(preview_step, bool)
    if not valid or not 0 < preview_step <= 1:  # type: ignore[operator]
        raise ConfigError(f"preview_step must be a share of the server's step above 0 and at most 1: {preview_step!r}.")
    _check_number("preview_correction", preview_correction, 1, "1 takes back all that a preview got wrong")
    if preview_rounds is not None and (type(preview_rounds) is not int or preview_rounds < 1):
        raise ConfigError(
            f"preview_rounds must be a whole number of rounds, at least 1, or null for all: {preview_rounds!r}."
        )
    if refinement_budget is None:
        for name, given in (("preview_step", preview_step), ("preview_correction", preview_correction)):
            if given != 1:
                raise ConfigError(
                    f"{name} is {given!r}, but without refinements every message counts in full: set "
                    "refinement_budget too, such as 0.4bpp."
                )
        if preview_rounds is not None:
            raise ConfigError(
                f"preview_rounds is {preview_rounds!r}, but without refinements no message is a preview: set "
                "refinement_budget too, such as 0.4bpp."
            )
        return
    for name, given in (("error_feedback", error_feedback > 0), ("scaffold", scaffold), ("coverage", coverage != 1)):
        if given:
            raise ConfigError(
                f"refinement_budget and {name} cannot be combined: "
                + ("say error_feedback: false." if name == "error_feedback" else "leave one of them out.")
            )


def _check_number(name: str, value: object, high: float, hint: str) -> None:
    valid = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not valid or not 0 <= value <= high:  # type: ignore[operator]
        raise ConfigError(f"{name} must be a number from 0 to {high:g} ({hint}), not {value!r}.")
