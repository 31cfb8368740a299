"""One method of a comparison, as a recipe says it: a codec and the switches of client and server around it."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from fedfstq_hf.errors import ConfigError
from fedfstq_hf.recipe.ranges import positive
from fedfstq_hf.recipe.strict import build, plain
from fedfstq_hf.sensitivity.options import check_fisher, check_objective
from fedfstq_hf.switches import check_coverage, check_freeze_a, check_refinement, check_switches, check_weights


@dataclass(frozen=True)
class ServerSettings:
    """The optimizer that the mean update is handed to as a pseudo-gradient.

    SGD at lr 1 is FedAvg, SGD with momentum FedAvgM; FedAdam is its paper's, Adam torch's.

    In YAML one flat mapping, `{optimizer: SGD, lr: 1.0, momentum: 0.9}`: all but `optimizer`, `lr` and `final_lr` is
    passed on.
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
        positive(self, "lr", *(["final_lr"] if self.final_lr is not None else []))
        if not self.optimizer.isidentifier():
            raise ConfigError(f"optimizer must be a class of torch.optim such as SGD or Adam, got {self.optimizer!r}")

    @classmethod
    def from_yaml(cls, value: object, where: str) -> "ServerSettings":
        """Build from the flat form."""
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} must be a mapping such as {{optimizer: SGD, lr: 1.0}}, got {value!r}")
        known = {key: value[key] for key in ("optimizer", "lr", "final_lr") if key in value}
        return build(cls, {**known, "options": {key: value[key] for key in value if key not in known}}, where)

    def to_yaml(self) -> dict[str, Any]:
        """The flat form."""
        final = {} if self.final_lr is None else {"final_lr": self.final_lr}
        return {"optimizer": self.optimizer, "lr": self.lr, **final, **plain(self.options)}


@dataclass(frozen=True)
class TimeCap:
    """Most seconds that a message may take on the link of that name."""

    seconds: float
    link: str


@dataclass(frozen=True)
class MethodSettings:
    """One method of a comparison: a codec and the switches of client and server around it."""

    codec: str = "fstq"
    codec_options: dict[str, Any] = field(default_factory=dict)
    uplink_budget: int | str | None = None
    """Most a message may weigh: bytes (`96kB`), bits per parameter (`0.3bpp`) or time on a link (`5s@2Mbps`); `auto`
    and `auto:LOW..HIGH` grow as progress slows, `ramp:LOW..HIGH` from round to round, `late:LOW..HIGH` for
    the last quarter of them. With `round:` before it (`round:1bpp`) it is what a round's messages share."""
    budget_by_examples: bool = False
    """Whether that budget is of a client with the mean number of examples, and others' grow with the square root of
    their own: who weighs more in the mean may say more. All clients' budgets together get no larger."""
    uplink_cap: str | None = None
    """Most time that a message may take on one of the recipe's links, such as `0.5s@straggler-tail`: a client whose
    link carries less than its budget in that time says less. In simulations; a real client sets its own budget."""
    refinement_budget: int | str | None = None
    """Budget of a second message of each client and round: its whole update again, better said, sent while the next
    round's clients train (`federation.refining`). The first is then a preview; None for none."""
    preview_step: float = 1.0
    """What a preview counts for until its refinement is there, as a share of the server's step."""
    preview_correction: float = 1.0
    """How much of what a preview got wrong is then taken back, as a share: clients that trained in between have
    repaired the rest."""
    preview_rounds: int | None = None
    """Rounds that begin with previews, None for all but the last. Later ones wait for messages as long as refinements:
    no preview's noise is then in what is published."""
    refinement_cap: str | None = None
    """As `uplink_cap`, for the second message."""
    error_feedback: bool | float = True
    """Whether a client keeps what its message left out and adds it to its next update; a number is the decay."""
    server: ServerSettings = field(default_factory=ServerSettings)
    weights: Literal["examples", "uniform", "bytes", "precision"] = "examples"
    """What an update weighs in the mean: its number of examples (FedAvg), as much as every other, or the bytes
    of its message: where a message's noise falls as one over its size (`sampled`), the mean with the least noise.
    `precision` is between: examples, but less for a message that is noisier than the round's others."""
    objective: Literal["full", "hard", "soft", "unbiased"] = "full"
    """What target tokens weigh in the local loss: all alike, the most sensitive ones only (the paper's mask), by
    sensitivity, or a weighted sample whose gradient is that of all in expectation."""
    token_keep_ratio: float = 0.5
    """Share of the target tokens that `hard` and `unbiased` keep; the others pay for no LM head."""
    fisher: Literal["gradients", "adam"] = "gradients"
    """Where the adapter's Fisher information comes from: gradients before clipping, or the optimizer's second moments,
    which cost nothing."""
    fisher_objective: Literal["same", "filtered-only"] = "same"
    """Whose gradients it is of: `filtered-only` has the optimizer see all tokens and costs a second backward pass at
    refresh steps."""
    lora: dict[str, Any] = field(default_factory=dict)
    """What this method's adapter has other than the recipe's `lora`, such as `{r: 2}`. Links stay those of the recipe's
    adapter; budgets in bits per parameter are of this one."""
    learning_rate: float | None = None
    """Of this method's local steps; None is the recipe's. Batches and steps are the same for all methods."""
    proximal_mu: float = 0.0
    """FedProx: pull towards the adapter that the round started from."""
    freeze_a: bool = False
    """FFA-LoRA: the factors A of the adapter stay as drawn; B is trained and travels: half the coordinates."""
    coverage: float = 1.0
    """Share of the adapter's tensors that one client's message is about: the clients of a round take turns, and the
    server averages each tensor over those that sent it. Bits per parameter stay those of the whole adapter."""
    scaffold: bool = False
    """SCAFFOLD: correct each local gradient by control variates, which travel as a second payload; all clients weigh
    alike."""
    learned_binarisation: bool = False
    """FedBAT: train the update in binary form, with a learned step size per tensor; needs codec `fedbat`."""
    binarisation_warmup: float = 0.5
    """Share of the local steps before that, in full precision (the paper's phi)."""
    binarisation_rho: float = 6.0
    """How fast step sizes are learned (the paper's rho)."""
    token_merge_ratio: float = 0.0
    """Fed-ToMe: share of the prompt's tokens that local training merges into similar ones, at most half; 0 for none."""
    token_merge_layer: int = 1
    """The decoder block before which they are merged, counted from 0."""

    def __post_init__(self) -> None:
        if not 0 <= float(self.error_feedback) <= 1:
            raise ConfigError(f"error_feedback must be true, false or a decay in (0, 1], got {self.error_feedback!r}")
        if self.learning_rate is not None:
            positive(self, "learning_rate")
        check_objective(self.objective, self.token_keep_ratio)
        check_fisher(self.fisher, self.fisher_objective, self.objective, self.proximal_mu)
        check_switches(self, scaffold=self.scaffold)
        check_freeze_a(self.freeze_a, scaffold=self.scaffold, learned_binarisation=self.learned_binarisation)
        check_coverage(self.coverage, scaffold=self.scaffold)
        check_weights(self.weights, scaffold=self.scaffold, coverage=self.coverage)
        check_refinement(
            self.refinement_budget,
            self.preview_step,
            self.preview_correction,
            self.preview_rounds,
            error_feedback=self.feedback_decay,
            scaffold=self.scaffold,
            coverage=self.coverage,
        )
        if self.budget_by_examples and self.uplink_budget is None:
            raise ConfigError(
                "budget_by_examples divides uplink_budget among the clients; set that too, such as 0.1bpp"
            )
        if self.time_cap is not None and self.uplink_budget is None:  # one that cannot be read is refused first
            raise ConfigError("uplink_cap lowers uplink_budget where a link is slow; set that too, such as 0.1bpp")
        if self.refinement_time_cap is not None and self.refinement_budget is None:
            raise ConfigError(
                "refinement_cap lowers refinement_budget where a link is slow; set that too, such as 0.4bpp"
            )
        if isinstance(self.uplink_budget, int) and self.uplink_budget < 1:
            raise ConfigError(f"uplink_budget must be at least 1 byte, got {self.uplink_budget}")

    @property
    def time_cap(self) -> TimeCap | None:
        """`uplink_cap`, read. Raises ConfigError where it cannot be."""
        return _time_cap("uplink_cap", self.uplink_cap)

    @property
    def refinement_time_cap(self) -> TimeCap | None:
        """`refinement_cap`, read. Raises ConfigError where it cannot be."""
        return _time_cap("refinement_cap", self.refinement_cap)

    @property
    def feedback_decay(self) -> float:
        """Decay of the residual: 1.0 for `true`, 0.0 without error feedback."""
        return float(self.error_feedback)


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
