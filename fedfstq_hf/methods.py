"""Switches of a method: one table, a row a switch. Recipe, spec, a client's config, cards and docs are made from it.

A row says the default, the range, what the switch needs and excludes, and in one sentence what it does. `LocalSwitches`
are those that a client alone can have (`FedFSTQConfig`); `MethodSettings` adds what server and clients must agree on
and is a federation's `method`; `recipe.RecipeMethod` adds what only a simulation varies. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fedfstq_hf.downlink_settings import DownlinkSettings
from fedfstq_hf.errors import ConfigError
from fedfstq_hf.ranges import Budget, Flag, Number, OneOf, Options, OrNone, Range, Text, Whole, shown

OBJECTIVES = ("full", "hard", "soft", "unbiased")
FISHER_SOURCES = ("gradients", "adam")
FISHER_OBJECTIVES = ("same", "filtered-only")
WEIGHTS = ("examples", "uniform", "precision")
OPTIMIZER_STATES = ("fresh", "kept")


class Row(str):
    """What a switch does, in one sentence for help texts, cards and docs; with the rest of its row.

    range: what its value may be. needs: a switch that must be on where this one is, with the remedy behind a colon.
    excludes: switches that must be off where this one is on, and `why`. only: where given, the value at which needs and
    exclusions hold; any but the default otherwise.
    """

    range: Range
    needs: str
    excludes: tuple[str, ...]
    why: str
    only: Any


def switch(
    default: Any,
    range: Range,
    says: str,
    *,
    needs: str = "",
    excludes: tuple[str, ...] = (),
    why: str = "leave one of them out",
    only: Any = None,
) -> Any:
    """A row of the table, as a dataclass field: `Row` says the arguments. default: when off, or what makes that."""
    row = Row(says)
    row.range, row.needs, row.excludes, row.why, row.only = range, needs, excludes, why, only
    metadata = {"help": row}  # alone: HfArgumentParser hands all of it to argparse
    return (
        field(default_factory=default, metadata=metadata)
        if callable(default)
        else field(default=default, metadata=metadata)
    )


if TYPE_CHECKING:
    OptionsOrText = dict[str, Any]
else:

    class OptionsOrText(dict):
        """A dict, also from the JSON text that a command line gives: `HfArgumentParser` calls a field's type."""

        def __init__(self, value: Any = ()) -> None:
            super().__init__(json.loads(value) if isinstance(value, str) else value)


@dataclass(frozen=True, kw_only=True)
class LocalSwitches:
    """What a client trains on and how its update travels. In a federation the mailbox's `method` wins."""

    codec: str = switch("fstq", Text(64), "How updates travel: the name of a codec.")
    codec_options: OptionsOrText = switch(dict, Options(), "Options of the codec.")
    uplink_budget: int | str | None = switch(
        None,
        Budget(),
        "Most that a message may weigh: bytes ('96kB'), bits per parameter ('0.3bpp'), time on a link ('5s@2Mbps'); "
        "'auto' and 'auto:LOW..HIGH' grow as progress slows, 'ramp:LOW..HIGH' from round to round, 'late:LOW..HIGH' "
        "for the last quarter of them; 'round:1bpp' is what a round's messages share.",
    )
    refinement_budget: int | str | None = switch(
        None,
        Budget(),
        "Likewise of a second message of each client and round: its whole update again, better said, sent while the "
        "next round's clients train; the first is then a preview.",
        excludes=("error_feedback", "scaffold", "max_staleness"),
    )
    error_feedback: float | None = switch(
        None,
        OrNone(Number(0, 1)),
        "Decay of what a message left out and the next one carries on, 0 for none; not given, 1 where the codec leaves "
        "out, and 0 where it is unbiased, which would diverge.",
    )
    objective: str = switch(
        "full",
        OneOf(OBJECTIVES),
        "What the target tokens weigh in the local loss between refresh steps: 'full' (all alike), 'hard' (the most "
        "sensitive ones only: the paper's mask), 'soft' (by sensitivity), 'unbiased' (a weighted sample whose gradient "
        "is that of all in expectation).",
    )
    token_keep_ratio: float = switch(
        0.5,
        Number(0, 1, above=True, hint="0.5 keeps half"),
        "Share of the target tokens that objectives 'hard' and 'unbiased' keep; the others pay for no LM head.",
    )
    fisher: str = switch(
        "gradients",
        OneOf(FISHER_SOURCES),
        "Source of the adapter's Fisher information: 'gradients' (of every step, before clipping) or 'adam' (the "
        "optimizer's second moments, which cost nothing and are those of clipped gradients).",
        excludes=("fisher_objective", "proximal_mu", "scaffold", "learned_binarisation"),
        why="these moments are of the gradients that the optimizer saw; use fisher='gradients', or leave out the other",
    )
    fisher_objective: str = switch(
        "same",
        OneOf(FISHER_OBJECTIVES),
        "Whose gradients it is of: 'same' as the optimizer's, or 'filtered-only': the filter is for the Fisher "
        "information alone, by a second backward pass at refresh steps.",
        needs="objective: set it to 'hard', 'soft' or 'unbiased'",
    )
    proximal_mu: float = switch(
        0.0,
        Number(hint="0 switches it off"),
        "FedProx: pull towards the adapter that the round started from, 0 for none.",
    )

    def check_switches(self) -> None:
        """Refuse values out of range, and combinations that would not mean what they say.

        Raises:
            ConfigError: naming the switch and what to type.
        """
        rows = dict(_rows(self))
        for name, row in rows.items():
            row.range.check(name, getattr(self, name))
        on = {name for name in rows if self._is_on(name)}
        for name, row in rows.items():
            value = getattr(self, name)
            if name not in on or (row.only is not None and value != row.only):
                continue
            needed, _, remedy = row.needs.partition(":")
            if needed and needed not in on:
                raise ConfigError(f"{name} is {shown(value)}, but needs {needed}:{remedy}.")
            for other in row.excludes:
                if other in on:
                    raise ConfigError(
                        f"{name} ({shown(value)}) and {other} ({shown(getattr(self, other))}) cannot be combined: "
                        f"{row.why}."
                    )

    def _is_on(self, name: str) -> bool:
        value = getattr(self, name)
        return value != default_of(type(self), name) and not (name == "error_feedback" and not value)


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """The optimizer that the mean update is handed to as a pseudo-gradient.

    SGD at lr 1 is FedAvg, SGD with momentum FedAvgM; FedAdam is its paper's, Adam torch's. In YAML and JSON one flat
    mapping, `{optimizer: SGD, lr: 1.0, momentum: 0.9}`: all but the first three is passed on.
    """

    optimizer: str = "SGD"
    """`FedAdam`, or a class name in `torch.optim`."""
    lr: float = 1.0
    final_lr: float | None = None
    """The rate of the last round, which is reached in equal steps; None keeps `lr`. Early on a long step makes up for
    what messages leave out, later it would make more of their noise."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further keyword arguments of that class."""

    def __post_init__(self) -> None:
        rate = Number(high=sys.float_info.max, above=True)
        rate.check("lr", self.lr)
        OrNone(rate).check("final_lr", self.final_lr)
        Options().check("server", self.options)
        if not isinstance(self.optimizer, str) or len(self.optimizer) > 64 or not self.optimizer.isidentifier():
            raise ConfigError(
                f"optimizer must be a class of torch.optim such as SGD or Adam, not {shown(self.optimizer)}."
            )

    @classmethod
    def from_yaml(cls, value: object, where: str) -> ServerSettings:
        """Build from the flat form. Raises ConfigError where it is none."""
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise ConfigError(f"{where} must be a mapping such as {{optimizer: SGD, lr: 1.0}}, not {shown(value)}.")
        known = {key: value[key] for key in ("optimizer", "lr", "final_lr") if key in value}
        try:
            return cls(**known, options={key: value[key] for key in value if key not in known})
        except ConfigError as error:
            raise ConfigError(f"{where}.{error}") from None

    def to_yaml(self) -> dict[str, Any]:
        """The flat form."""
        final = {} if self.final_lr is None else {"final_lr": self.final_lr}
        return {"optimizer": self.optimizer, "lr": self.lr, **final, **self.options}


@dataclass(frozen=True, kw_only=True)
class MethodSettings(LocalSwitches):
    """One method: a codec and the switches of client and server around it; `method` in a federation's spec."""

    budget_by_examples: bool = switch(
        False,
        Flag(),
        "Whether the budget is of a client with the mean number of examples, and others' grow with the square root of "
        "their own: who weighs more in the mean may say more.",
        needs="uplink_budget: set that too, such as 0.1bpp",
    )
    preview_step: float = switch(
        1.0,
        Number(0, 1, above=True),
        "What a preview counts for until its refinement is there, as a share of the server's step.",
        needs="refinement_budget: set that too, such as 0.4bpp",
    )
    preview_correction: float = switch(
        1.0,
        Number(0, 1, hint="1 takes back all that a preview got wrong"),
        "How much of what a preview got wrong is then taken back: clients that trained in between have repaired the "
        "rest.",
        needs="refinement_budget: set that too, such as 0.4bpp",
    )
    preview_rounds: int | None = switch(
        None,
        OrNone(Whole(1, 10**6)),
        "Rounds that begin with previews, all but the last where not given; later messages are as long as refinements.",
        needs="refinement_budget: set that too, such as 0.4bpp",
    )
    server: ServerSettings = field(
        default_factory=ServerSettings,
        metadata={"help": "The optimizer that the mean update is handed to as a pseudo-gradient."},
    )
    downlink: DownlinkSettings | None = field(
        default=None,
        metadata={
            "help": "How the next adapter is published for download: 'exact', or with lossy keyframes; not given, "
            "exact where all clients are asked in every round and may see each other's messages, and for other codecs."
        },
    )
    weights: str = switch(
        "examples",
        OneOf(WEIGHTS),
        "What an update weighs in the mean: its number of examples (FedAvg), as much as every other ('uniform'), or "
        "its examples and less where its message is noisier than others ('precision').",
        excludes=("scaffold",),
        why="with control variates all clients weigh alike",
        only="precision",
    )
    max_staleness: int = switch(
        0, Whole(0, 10**6), "A late update is still used up to so many rounds after its own; 0 refuses all late ones."
    )
    staleness_discount: float = switch(
        0.5, Number(0, 1, above=True), "Factor on the weight of an update per round of its staleness."
    )
    clip: float | None = switch(
        10.0,
        OrNone(Number(1, hint="a multiple of the round's median")),
        "An update whose norm exceeds that many times the round's median norm is scaled down to it; null for none.",
    )
    weight_cap: float | None = switch(
        10.0,
        OrNone(Number(1, hint="a multiple of the round's median")),
        "An update weighs at most that many times the round's median; null for no cap.",
    )
    freeze_a: bool = switch(
        False,
        Flag(),
        "FFA-LoRA: the factors A of the adapter stay as drawn; B is trained and travels: half the coordinates.",
        excludes=("scaffold", "learned_binarisation"),
    )
    scaffold: bool = switch(
        False,
        Flag(),
        "SCAFFOLD: correct each local gradient by control variates, which travel as a second payload; all clients "
        "weigh alike.",
    )
    learned_binarisation: bool = switch(
        False,
        Flag(),
        "FedBAT: train the update in binary form, with a learned step size per tensor, which codec 'fedbat' sends.",
    )
    binarisation_warmup: float = switch(
        0.5,
        Number(0, 1, hint="the share of local steps in full precision"),
        "Share of the local steps before it, in full precision (phi in the paper).",
    )
    binarisation_rho: float = switch(
        6.0,
        Number(0, 1000, hint="6 in the paper, 0 learns no step sizes"),
        "How fast step sizes are learned (rho in the paper).",
    )
    token_merge_ratio: float = switch(
        0.0,
        Number(0, 0.5, hint="0 switches it off"),
        "Fed-ToMe: share of the prompt's tokens that local training merges into similar ones, at most half.",
    )
    token_merge_layer: int = switch(
        1, Whole(0, 10_000), "The decoder block before which they are merged, counted from 0."
    )

    def __post_init__(self) -> None:
        if not isinstance(self.server, ServerSettings):
            # the flat form of YAML and JSON
            object.__setattr__(self, "server", ServerSettings.from_yaml(self.server, "server"))  # type: ignore[unreachable]
        object.__setattr__(self, "downlink", DownlinkSettings.from_yaml(self.downlink, "downlink"))
        self.check_switches()
        if self.learned_binarisation and self.codec != "fedbat":
            raise ConfigError(
                f"learned_binarisation needs codec 'fedbat', which sends what it learns, not {self.codec!r}."
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain data from which `from_dict` makes an equal one: all switches but those of a simulation alone."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(MethodSettings)}
        downlink = None if self.downlink is None else self.downlink.to_yaml()
        return values | {
            "server": self.server.to_yaml(),
            "codec_options": dict(self.codec_options),
            "downlink": downlink,
        }

    @classmethod
    def from_dict(cls, values: object) -> MethodSettings:
        """Inverse of `to_dict`, of anybody's values.

        Raises:
            ConfigError: no mapping, an unknown switch, or a value out of range.
        """
        known = [item.name for item in dataclasses.fields(MethodSettings)]
        if not isinstance(values, Mapping):
            raise ConfigError(f"method must be a mapping of switches, not {shown(values)}.")
        if unknown := sorted(str(key) for key in values if key not in known):
            raise ConfigError(f"method has no switch {shown(unknown[0])}; known: {', '.join(known)}.")
        try:
            return MethodSettings(**values)
        except ConfigError as error:
            raise ConfigError(f"method.{error}") from None


def feedback_decay(asked: float | None, *, codec: str, unbiased: bool) -> float:
    """Decay of the residual that a client carries on: what was asked for, or what goes with the codec.

    An unbiased code makes messages longer than the update, by 1 + w in mean square: what such a message got wrong grows
    in the residual from round to round instead of fading (measured: norms 3.6, 10.6, 30, 85, 240, 645 in six rounds).

    Args:
        unbiased: `Codec.unbiased` of that codec.

    Raises:
        ConfigError: error feedback was asked for, and the codec is unbiased.
    """
    if asked is None:
        return 0.0 if unbiased else 1.0
    if unbiased and asked:
        raise ConfigError(
            f"error_feedback {asked!r} would diverge with codec {codec!r}, which is unbiased: what its messages get "
            "wrong is longer than what they carry. Leave error_feedback out, or say 0."
        )
    return float(asked)


def default_of(cls: type[LocalSwitches], name: str) -> Any:
    """A switch's default."""
    item = cls.__dataclass_fields__[name]
    return item.default_factory() if callable(item.default_factory) else item.default


def _rows(settings: LocalSwitches) -> Iterator[tuple[str, Row]]:
    for item in dataclasses.fields(settings):
        if isinstance(row := item.metadata.get("help"), Row):
            yield item.name, row
