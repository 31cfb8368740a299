"""What a recipe may say: one dataclass per section, with its defaults, ranges and the reason for them.

Pure data: nothing here imports torch, so that listing and checking recipes is instant.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from fedfstq_hf.errors import ConfigError
from fedfstq_hf.methods import MethodSettings
from fedfstq_hf.ranges import at_least_zero, positive, within
from fedfstq_hf.recipe.network import LinkProfile, get_link
from fedfstq_hf.recipe.strict import build, join, plain
from fedfstq_hf.workloads.data_config import DataConfig


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


Scalar = bool | int | float | str | None

SAFE_LORA_INITS = (True, False, "gaussian", "orthogonal")
"""Initialisations that leave the base model as it is; PiSSA, OLoRA, LoftQ, CorDA and their kin subtract from it."""


@dataclass(frozen=True)
class LoraSettings:
    """The adapter, as keywords of `peft.LoraConfig`. Every client must use the same."""

    r: int = 16
    """Rank: higher learns more and costs proportionally more bytes."""
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    exclude_modules: str | list[str] | None = None
    layers_to_transform: list[int] | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, int] = field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str = True

    def __post_init__(self) -> None:
        positive(self, "r", "lora_alpha")
        within(self, "lora_dropout", 0, 1, open_end=True)
        if self.init_lora_weights not in SAFE_LORA_INITS:
            raise ConfigError(
                f"init_lora_weights must be one of {', '.join(map(str, SAFE_LORA_INITS))}, got "
                f"{self.init_lora_weights!r}: others change the base model, and clients must share it unchanged"
            )

    def peft_kwargs(self) -> dict[str, Any]:
        """Keyword arguments for `peft.LoraConfig`, for causal language models."""
        return {"task_type": "CAUSAL_LM", "bias": "none", **plain(self)}


@dataclass(frozen=True)
class TrainingSettings:
    """Local training. All but the first four are fields of `transformers.TrainingArguments` under the same name."""

    local_steps: int = 10
    """Optimizer steps of a client in a round."""
    optimizer_state: Literal["fresh", "kept"] = "fresh"
    """Whether a client begins a round with new optimizer moments or with those of its last round."""
    refresh_steps: int = 10
    """Token sensitivity is measured every so many local steps (H in the paper)."""
    rho: float = 0.9
    """Decay of the moving averages of token sensitivity and adapter Fisher."""
    per_device_train_batch_size: int = 4
    gradient_accumulation_steps: int = 1
    learning_rate: float = 2e-4
    lr_scheduler_type: str = "constant"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    optim: str = "adamw_torch"
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    bf16: bool = False
    activation_checkpointing: bool = False
    """Saves memory, costs about a third more time per step."""

    def __post_init__(self) -> None:
        positive(self, "local_steps", "refresh_steps", "per_device_train_batch_size", "gradient_accumulation_steps")
        positive(self, "learning_rate", "adam_epsilon")
        within(self, "rho", 0, 1, open_end=True)
        within(self, "adam_beta1", 0, 1, open_end=True)
        within(self, "adam_beta2", 0, 1, open_end=True)
        at_least_zero(self, "warmup_steps", "weight_decay", "max_grad_norm")

    def trainer_kwargs(self) -> dict[str, Any]:
        """Keyword arguments for `transformers.TrainingArguments`; steps, seed and output folder are the caller's."""
        ours = ("local_steps", "optimizer_state", "refresh_steps", "rho")
        return {name: value for name, value in plain(self).items() if name not in ours}


@dataclass(frozen=True)
class FederationSettings:
    """How many clients there are, who takes part, and how the data fall to them."""

    clients: int = 10
    clients_per_round: int = 4
    rounds: int = 10
    dropout: float = 0.0
    """Probability that a sampled client's update never arrives (paper: 0.1)."""
    packet_loss: float = 0.0
    """Probability that one transmission of a packet of 1500 bytes is lost on the uplink."""
    retransmissions: int = 3
    """How often the link layer repeats a lost packet before it gives it up, and the message with it."""
    partition: Literal["dirichlet", "iid", "natural"] = "dirichlet"
    alpha: float = 0.1
    """Dirichlet concentration over topics; small is skewed."""
    min_examples: int = 1
    """No client holds fewer training examples than this."""

    def __post_init__(self) -> None:
        positive(self, "clients", "clients_per_round", "rounds", "alpha", "min_examples")
        within(self, "dropout", 0, 1, open_end=True)
        within(self, "packet_loss", 0, 1, open_end=True)
        at_least_zero(self, "retransmissions")
        if self.clients_per_round > self.clients:
            raise ConfigError(
                f"clients_per_round must be at most clients = {self.clients}, got {self.clients_per_round}"
            )


@dataclass(frozen=True)
class EvaluationSettings:
    """What quality is, measured on the held-out examples before round 1 and after every round."""

    metric: Literal["eval_loss", "exact_match"] = "eval_loss"
    batch_size: int = 16
    split: Literal["test", "validation"] = "test"
    """`validation` is for tuning: rows that are neither test nor trained on. The data's own rows of that name where it
    has any, else `data.test_fraction` of the groups of the training rows, which then are not trained on."""

    def __post_init__(self) -> None:
        positive(self, "batch_size")

    @property
    def higher_is_better(self) -> bool:
        """Direction of the metric."""
        return self.metric != "eval_loss"


@dataclass(frozen=True)
class TargetSettings:
    """The quality to which bytes and time are counted: a share of what one method improves over the whole run."""

    of: str = "fedavg"
    """The method whose improvement sets the target."""
    fraction: float = 0.9
    consecutive: int = 2
    """In so many consecutive evaluations the metric must hold the target."""

    def __post_init__(self) -> None:
        positive(self, "fraction", "consecutive")
        within(self, "fraction", 0, 1)


@dataclass(frozen=True)
class Recipe:
    """A whole comparison, ready to run."""

    name: str
    methods: dict[str, RecipeMethod]
    description: str = ""
    model: str = "demo"
    """A folder, a Hub model id, or `demo` for the embedded model."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the frozen base model; adapters are float32 in any case."""
    data: DataConfig = field(default_factory=DataConfig)
    lora: LoraSettings = field(default_factory=LoraSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    federation: FederationSettings = field(default_factory=FederationSettings)
    links: tuple[LinkProfile, ...] = field(default_factory=lambda: (get_link("lte-20mbps"), get_link("straggler-tail")))
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    target: TargetSettings = field(default_factory=TargetSettings)
    seeds: tuple[int, ...] = (0,)
    sweep: dict[str, list[Scalar]] = field(default_factory=dict)
    """Settings to run with several values, each value a comparison of its own: `{federation.dropout: [0.0, 0.3]}`."""

    def __post_init__(self) -> None:
        if empty := [key for key, values in self.sweep.items() if not values]:
            raise ConfigError(f"sweep.{empty[0]} must list at least one value")
        if not self.methods:
            raise ConfigError("methods must name at least one method, such as fedavg: {codec: fp32}")
        if not self.links:
            raise ConfigError("links must name at least one link profile, such as [lte-20mbps]")
        if not self.seeds or min(self.seeds) < 0:
            raise ConfigError(f"seeds must be at least one whole number of at least 0, got {list(self.seeds)}")
        for name in self.methods:
            self.for_method(name)
        for name, items in (("seeds", self.seeds), ("links", [link.name for link in self.links])):
            if len(set(items)) != len(items):
                raise ConfigError(f"{name} must be distinct, got {list(items)}")

    @classmethod
    def from_dict(cls, mapping: object, where: str = "recipe") -> "Recipe":
        """Build from what `yaml` or `to_dict` gives. `seeds: 3` means 0, 1, 2; a link is a name or a mapping."""
        if isinstance(mapping, Mapping):
            mapping = {**mapping}
            if "seeds" in mapping:
                mapping["seeds"] = _seeds(mapping["seeds"], join(where, "seeds"))
            if "links" in mapping:
                mapping["links"] = _links(mapping["links"], join(where, "links"))
        return build(cls, mapping, where)

    def for_method(self, name: str) -> "Recipe":
        """This recipe with the adapter and the learning rate that method `name` has."""
        method = self.methods[name]
        if not method.lora and method.learning_rate is None:
            return self
        lora = build(LoraSettings, {**plain(self.lora), **method.lora}, f"methods.{name}.lora")
        rate = self.training.learning_rate if method.learning_rate is None else method.learning_rate
        plainer = replace(method, lora={}, learning_rate=None)
        training = replace(self.training, learning_rate=rate)
        return replace(self, lora=lora, training=training, methods={name: plainer})

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `from_dict` turns into an equal recipe."""
        result: dict[str, Any] = plain(self)
        return result


def _seeds(value: Any, where: str) -> list[int]:
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 1:
            raise ConfigError(f"{where} must be how many seeds to run (at least 1) or a list of seeds, got {value}")
        return list(range(value))
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{where} must be how many seeds to run or a list such as [0, 1, 2], got {value!r}")
    return list(value)


def _links(value: Any, where: str) -> list[LinkProfile]:
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{where} must be a list of profile names or of mappings, got {value!r}")
    links = []
    for index, item in enumerate(value):
        if isinstance(item, str):
            try:
                links.append(get_link(item))
            except ConfigError as error:
                raise ConfigError(f"{where}[{index}]: {error}") from None
        else:
            links.append(build(LinkProfile, item, f"{where}[{index}]"))
    return links
