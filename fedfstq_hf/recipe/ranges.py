"""Checks of a section's numbers, with errors that name the field and what it is."""

import math

from fedfstq_hf.errors import ConfigError


def positive(settings: object, *names: str) -> None:
    """Refuse fields that are not finite numbers above 0."""
    for name in names:
        if not 0 < getattr(settings, name) < math.inf:
            raise ConfigError(f"{name} must be above 0, got {getattr(settings, name)!r}")


def at_least_zero(settings: object, *names: str) -> None:
    """Refuse fields that are not finite numbers of at least 0."""
    for name in names:
        if not 0 <= getattr(settings, name) < math.inf:
            raise ConfigError(f"{name} must be at least 0, got {getattr(settings, name)!r}")


def within(settings: object, name: str, low: float, high: float, *, open_end: bool = False) -> None:
    """Refuse a field outside `[low, high]`, with `open_end` outside `[low, high)`."""
    value = getattr(settings, name)
    if not (low <= value < high if open_end else low <= value <= high):
        end = ")" if open_end else "]"
        raise ConfigError(f"{name} must lie in [{low}, {high}{end}, got {value!r}")
