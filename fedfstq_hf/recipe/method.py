"""One method of a comparison, as a recipe says it: the switches of a method, and what only a simulation varies."""

import math
import re
from dataclasses import dataclass, field
from typing import Any

from fedfstq_hf.errors import ConfigError
from fedfstq_hf.methods import MethodSettings
from fedfstq_hf.ranges import positive


@dataclass(frozen=True)
class TimeCap:
    """Most seconds that a message may take on the link of that name."""

    seconds: float
    link: str


@dataclass(frozen=True, kw_only=True)
class RecipeMethod(MethodSettings):
    """One method of a comparison."""

    uplink_cap: str | None = None
    """Most time that a message may take on one of the recipe's links, such as `0.5s@straggler-tail`: a client whose
    link carries less than its budget in that time says less. A real client sets its own budget."""
    refinement_cap: str | None = None
    """As `uplink_cap`, for the second message."""
    lora: dict[str, Any] = field(default_factory=dict)
    """What this method's adapter has other than the recipe's `lora`, such as `{r: 2}`. Links stay those of the recipe's
    adapter; budgets in bits per parameter are of this one."""
    learning_rate: float | None = None
    """Of this method's local steps; None is the recipe's. Batches and steps are the same for all methods."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.learning_rate is not None:
            positive(self, "learning_rate")
        if self.time_cap is not None and self.uplink_budget is None:  # one that cannot be read is refused first
            raise ConfigError("uplink_cap lowers uplink_budget where a link is slow; set that too, such as 0.1bpp")
        if self.refinement_time_cap is not None and self.refinement_budget is None:
            raise ConfigError(
                "refinement_cap lowers refinement_budget where a link is slow; set that too, such as 0.4bpp"
            )

    @property
    def time_cap(self) -> TimeCap | None:
        """`uplink_cap`, read. Raises ConfigError where it cannot be."""
        return _time_cap("uplink_cap", self.uplink_cap)

    @property
    def refinement_time_cap(self) -> TimeCap | None:
        """`refinement_cap`, read. Raises ConfigError where it cannot be."""
        return _time_cap("refinement_cap", self.refinement_cap)

    @property
    def shared(self) -> MethodSettings:
        """What of it a federation's spec says."""
        return MethodSettings.from_dict(self.to_dict())


def _time_cap(name: str, written: str | None) -> TimeCap | None:
    if written is None:
        return None
    match = re.fullmatch(r"\s*([0-9.eE+-]+)\s*s\s*@\s*(\S+)\s*", str(written))
    try:
        seconds = float(match[1]) if match else math.nan
    except ValueError:
        seconds = math.nan
    if match is None or not 0 < seconds < math.inf:
        raise ConfigError(
            f"{name} is {written!r}; expected a time above 0 on one of the recipe's links, such as 0.5s@straggler-tail"
        )
    return TimeCap(seconds, match[2])
