"""How a federation publishes its next adapter for download (docs/downlink.md). Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedfstq_hf.errors import ConfigError
from fedfstq_hf.ranges import Budget, Number, shown

EXACT = "exact"
"""A downlink without lossy frames."""


@dataclass(frozen=True, kw_only=True)
class DownlinkSettings:
    """How the next adapter is published for download; see `federation.frames`. In YAML and JSON `exact`, or a mapping
    such as `{keyframe: 2bpp, longest: 1.5}`."""

    keyframe: int | str | None = "2bpp"
    """Budget of a lossy keyframe; None publishes none, which is `exact`."""
    longest: float = 1.0
    """Most that a newcomer downloads, as a multiple of a keyframe: where deltas since the last one make it more, the
    round has a keyframe."""
    step: int | str | None = None
    """Budget of a lossy step in rounds between keyframes whose messages nobody else may see."""

    def __post_init__(self) -> None:
        Budget().check("keyframe", self.keyframe)
        Budget().check("step", self.step)
        Number(1, 1000).check("longest", self.longest)
        if self.keyframe is None and self.step is not None:
            raise ConfigError("step is a lossy frame, and needs keyframe: give its budget, such as 2bpp.")

    @classmethod
    def from_yaml(cls, value: object, where: str) -> DownlinkSettings | None:
        """Build from `exact` or a mapping; None stays None. Raises ConfigError where it is none of these."""
        if value is None or isinstance(value, cls):
            return value
        if value == EXACT:
            return cls(keyframe=None)
        known = [item.name for item in dataclasses.fields(cls)]
        if not isinstance(value, Mapping) or not set(value) <= set(known):
            raise ConfigError(
                f"{where} must be {EXACT!r} or a mapping such as {{keyframe: 2bpp, longest: 1.5}}, not {shown(value)}."
            )
        try:
            return cls(**value)
        except ConfigError as error:
            raise ConfigError(f"{where}.{error}") from None

    def to_yaml(self) -> str | dict[str, Any]:
        """What `from_yaml` reads."""
        return EXACT if self.keyframe is None else dataclasses.asdict(self)


def default_downlink(codec: str, *, exact: bool) -> DownlinkSettings:
    """What serves where a method does not say.

    Lossy keyframes pay where a client misses rounds: what it missed weighs more than they do. Who is asked in every
    round needs the round's messages alone. Other codecs' downlinks are exact, as published.

    Args:
        codec: of the messages.
        exact: all clients are asked in every round, and may see each other's messages.
    """
    return DownlinkSettings(keyframe=None) if exact or codec != "fstq" else DownlinkSettings()
