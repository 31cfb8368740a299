"""Ranges of settings: what a value may be, and an error that names the setting, the value and what to type instead.

Imports no torch, so that settings check at once, and allocates nothing, so that a spec of anybody can be checked.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from fedfstq_hf.errors import ConfigError
from fedfstq_hf.text import printable

LARGEST = 1e9
ENTRIES, KEY_LENGTH, TEXT_LENGTH = 64, 64, 200
"""Of a mapping: most names, most characters of a name and of a text."""


class Range(Protocol):
    """What a setting may be."""

    def check(self, name: str, value: object) -> None:
        """Raise ConfigError where `value` is none of it."""


@dataclass(frozen=True)
class Number:
    """A finite number from `low` to `high`; `above` leaves out `low`, `below` leaves out `high`. true is none."""

    low: float = 0.0
    high: float = LARGEST
    above: bool = False
    below: bool = False
    hint: str = ""

    def check(self, name: str, value: object) -> None:
        """As `Range`."""
        good = is_number(value) and self.low <= value <= self.high  # type: ignore[operator]
        if not good or (self.above and value == self.low) or (self.below and value == self.high):
            low = f"above {self.low:g}" if self.above else f"of at least {self.low:g}"
            high = f" and {'below' if self.below else 'at most'} {self.high:g}" if self.high < LARGEST else ""
            hint = f" ({self.hint})" if self.hint else ""
            raise ConfigError(f"{name} must be a number {low}{high}{hint}, not {shown(value)}.")


@dataclass(frozen=True)
class Whole:
    """A whole number from `low` to `high`; true and 1.0 are none."""

    low: int = 0
    high: int = 2**63 - 1

    def check(self, name: str, value: object) -> None:
        """As `Range`."""
        if type(value) is not int or value < self.low:
            raise ConfigError(f"{name} must be a whole number of at least {self.low}, not {shown(value)}.")
        if value > self.high:
            raise ConfigError(f"{name} must be at most {self.high}, not {shown(value)}.")


@dataclass(frozen=True)
class OneOf:
    """One of some texts."""

    names: Sequence[str]

    def check(self, name: str, value: object) -> None:
        """As `Range`."""
        if value not in self.names:
            raise ConfigError(f"{name} must be one of {', '.join(self.names)}, not {shown(value)}.")


@dataclass(frozen=True)
class Text:
    """Text of at most so many characters."""

    length: int = TEXT_LENGTH

    def check(self, name: str, value: object) -> None:
        """As `Range`."""
        if not isinstance(value, str) or len(value) > self.length:
            raise ConfigError(f"{name} must be text of at most {self.length} characters, not {shown(value)}.")


class Flag:
    """true or false."""

    def check(self, name: str, value: object) -> None:
        """As `Range`."""
        if not isinstance(value, bool):
            raise ConfigError(f"{name} must be true or false, not {shown(value)}.")


@dataclass(frozen=True)
class Options:
    """A short mapping of names to plain values or short lists of them."""

    entries: int = ENTRIES

    def check(self, name: str, value: object) -> None:
        """As `Range`."""
        if not isinstance(value, Mapping) or len(value) > self.entries:
            raise ConfigError(
                f"{name} must be a mapping of at most {self.entries} names to values, not {shown(value)}."
            )
        for key, item in value.items():
            if not isinstance(key, str) or len(key) > KEY_LENGTH:
                raise ConfigError(
                    f"{name} has the key {shown(key)}; expected a name of at most {KEY_LENGTH} characters."
                )
            several = isinstance(item, (list, tuple)) and len(item) <= ENTRIES
            if not all(_is_plain(part) for part in (item if several else [item])):
                raise ConfigError(
                    f"{name}.{printable(key, 80)} must be one plain value or a short list: {shown(item)}."
                )


@dataclass(frozen=True)
class OrNone:
    """None, or what another range has."""

    range: Range

    def check(self, name: str, value: object) -> None:
        """As `Range`."""
        if value is not None:
            self.range.check(name, value)


@dataclass(frozen=True)
class Budget:
    """Bytes, or a budget as people write it (`codec.budget`), which is read where the adapter is known; or None."""

    def check(self, name: str, value: object) -> None:
        """As `Range`."""
        if isinstance(value, str):
            Text(100).check(name, value)
        elif value is not None:
            Whole(1, 2**32).check(name, value)


def is_number(value: object, largest: float = sys.float_info.max) -> bool:
    """Whether a value is an int or float of at most that size: NaN and true are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= largest


def shown(value: object) -> str:
    """A value as errors quote it."""
    return printable(repr(value), 80)


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


def _is_plain(value: object) -> bool:
    return (
        value is None
        or isinstance(value, bool)
        or (isinstance(value, str) and len(value) <= TEXT_LENGTH)
        or (isinstance(value, int) and abs(value) < 2**64)
        or is_number(value)
    )
