"""What a recipe may say: one dataclass per section, with its defaults, ranges and the reason for them.

Pure data: nothing here imports torch, so that listing and checking recipes is instant.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from fedfstq_hf.errors import ConfigError
from fedfstq_hf.recipe.strict import build, join, plain
from fedfstq_hf.sensitivity.options import check_fisher, check_objective
from fedfstq_hf.simulation.network import LinkProfile, get_link
from fedfstq_hf.switches import check_coverage, check_freeze_a, check_switches
from fedfstq_hf.workloads.config import DataConfig

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
        _positive(self, "r", "lora_alpha")
        _within(self, "lora_dropout", 0, 1, open_end=True)
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
        _positive(self, "local_steps", "refresh_steps", "per_device_train_batch_size", "gradient_accumulation_steps")
        _positive(self, "learning_rate", "adam_epsilon")
        _within(self, "rho", 0, 1, open_end=True)
        _within(self, "adam_beta1", 0, 1, open_end=True)
        _within(self, "adam_beta2", 0, 1, open_end=True)
        _at_least_zero(self, "warmup_steps", "weight_decay", "max_grad_norm")

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
        _positive(self, "clients", "clients_per_round", "rounds", "alpha", "min_examples")
        _within(self, "dropout", 0, 1, open_end=True)
        _within(self, "packet_loss", 0, 1, open_end=True)
        _at_least_zero(self, "retransmissions")
        if self.clients_per_round > self.clients:
            raise ConfigError(
                f"clients_per_round must be at most clients = {self.clients}, got {self.clients_per_round}"
            )


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
        _positive(self, "lr", *(["final_lr"] if self.final_lr is not None else []))
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
    and `auto:LOW..HIGH` grow as progress slows, `ramp:LOW..HIGH` from round to round."""
    budget_by_examples: bool = False
    """Whether that budget is of a client with the mean number of examples, and others' grow with the square root of
    their own: who weighs more in the mean may say more. All clients' budgets together get no larger."""
    uplink_cap: str | None = None
    """Most time that a message may take on one of the recipe's links, such as `0.5s@straggler-tail`: a client whose
    link carries less than its budget in that time says less. In simulations; a real client sets its own budget."""
    error_feedback: bool | float = True
    """Whether a client keeps what its message left out and adds it to its next update; a number is the decay."""
    server: ServerSettings = field(default_factory=ServerSettings)
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
            _positive(self, "learning_rate")
        check_objective(self.objective, self.token_keep_ratio)
        check_fisher(self.fisher, self.fisher_objective, self.objective, self.proximal_mu)
        check_switches(self, scaffold=self.scaffold)
        check_freeze_a(self.freeze_a, scaffold=self.scaffold, learned_binarisation=self.learned_binarisation)
        check_coverage(self.coverage, scaffold=self.scaffold)
        if self.budget_by_examples and self.uplink_budget is None:
            raise ConfigError(
                "budget_by_examples divides uplink_budget among the clients; set that too, such as 0.1bpp"
            )
        if self.time_cap is not None and self.uplink_budget is None:  # one that cannot be read is refused first
            raise ConfigError("uplink_cap lowers uplink_budget where a link is slow; set that too, such as 0.1bpp")
        if isinstance(self.uplink_budget, int) and self.uplink_budget < 1:
            raise ConfigError(f"uplink_budget must be at least 1 byte, got {self.uplink_budget}")

    @property
    def time_cap(self) -> TimeCap | None:
        """`uplink_cap`, read. Raises ConfigError where it cannot be."""
        if self.uplink_cap is None:
            return None
        match = re.fullmatch(r"\s*([0-9.eE+-]+)\s*s\s*@\s*(\S+)\s*", str(self.uplink_cap))
        try:
            seconds = float(match[1]) if match else math.nan
        except ValueError:
            seconds = math.nan
        if match is None or not 0 < seconds < math.inf:
            raise ConfigError(
                f"uplink_cap is {self.uplink_cap!r}; expected a time above 0 on one of the recipe's links, such as "
                "0.5s@straggler-tail"
            )
        return TimeCap(seconds, match[2])

    @property
    def feedback_decay(self) -> float:
        """Decay of the residual: 1.0 for `true`, 0.0 without error feedback."""
        return float(self.error_feedback)


@dataclass(frozen=True)
class EvaluationSettings:
    """What quality is, measured on the held-out examples before round 1 and after every round."""

    metric: Literal["eval_loss", "exact_match"] = "eval_loss"
    batch_size: int = 16
    split: Literal["test", "validation"] = "test"
    """`validation` is for tuning: rows that are neither test nor trained on. The data's own rows of that name where it
    has any, else `data.test_fraction` of the groups of the training rows, which then are not trained on."""

    def __post_init__(self) -> None:
        _positive(self, "batch_size")

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
        _positive(self, "fraction", "consecutive")
        _within(self, "fraction", 0, 1)


@dataclass(frozen=True)
class Recipe:
    """A whole comparison, ready to run."""

    name: str
    methods: dict[str, MethodSettings]
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


def _positive(settings: object, *names: str) -> None:
    for name in names:
        if not 0 < getattr(settings, name) < math.inf:
            raise ConfigError(f"{name} must be above 0, got {getattr(settings, name)!r}")


def _at_least_zero(settings: object, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(settings, name) < math.inf:
            raise ConfigError(f"{name} must be at least 0, got {getattr(settings, name)!r}")


def _within(settings: object, name: str, low: float, high: float, *, open_end: bool = False) -> None:
    value = getattr(settings, name)
    if not (low <= value < high if open_end else low <= value <= high):
        end = ")" if open_end else "]"
        raise ConfigError(f"{name} must lie in [{low}, {high}{end}, got {value!r}")
