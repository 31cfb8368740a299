"""The federation's spec: what all its clients share. Published once, with round 0; it wins over a client's settings.

A spec comes from a mailbox, and a mailbox from anybody. So types and largest values are checked before anything is made
of them: nothing of what passes here names a token, a module, a plugin or a place to write to, and it costs no memory to
hold. Ranges of the method's switches stand in `fedfstq_hf.methods`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from fedfstq_hf import __version__
from fedfstq_hf.codec import Schema, get_codec
from fedfstq_hf.codec.budget import parse_budget
from fedfstq_hf.codec.schema import TrainedPart
from fedfstq_hf.downlink_settings import DownlinkSettings, default_downlink
from fedfstq_hf.errors import BudgetError, ConfigError, MailboxError
from fedfstq_hf.federation.keys import parse_public_key
from fedfstq_hf.federation.mailbox.protocol import UNATTENDED_SECONDS
from fedfstq_hf.federation.record import other_version
from fedfstq_hf.methods import OPTIMIZER_STATES, MethodSettings, feedback_decay
from fedfstq_hf.ranges import LARGEST, Flag, Number, OneOf, Options, OrNone, Range, Text, Whole, is_number, shown
from fedfstq_hf.text import parse_object, printable

FORMAT = 5
MAX_SPEC_BYTES = 1 << 16
MAX_STEPS = 10**6
MAX_CLIENTS = 10**6
MAX_MESSAGE_BYTES = 2**32
MAX_BATCH = 4096
MAX_TOKENS = 1 << 20

_FIELDS: dict[str, Range] = {
    "name": Text(200),
    "model": Text(300),
    "base_fingerprint": Options(),
    "schema": Text(64),
    "rounds": Whole(1, MAX_STEPS),
    "local_steps": Whole(1, MAX_STEPS),
    "max_message_bytes": Whole(1, MAX_MESSAGE_BYTES),
    "min_clients": Whole(1, MAX_CLIENTS),
    "clients_per_round": OrNone(Whole(1, MAX_CLIENTS)),
    "round_seconds": OrNone(Number(above=True)),
    "num_clients": OrNone(Whole(1, MAX_CLIENTS)),
    "mean_examples": OrNone(Whole(1, 10**12)),
    "training": Options(),
    "client_defaults": Options(),
    "data": Options(),
    "seed": Whole(0, 2**63 - 1),
    "signatures": Flag(),
    "founder_key": OrNone(Text()),
    "sealing_key": OrNone(Text()),
    "share_saliency": Flag(),
    "package_version": Text(64),
    "salt": Text(64),
}

# TrainingArguments that every client must share; batch size, precision, logging and the like are a client's own.
SHARED_TRAINING_ARGUMENTS = (
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "learning_rate",
    "lr_scheduler_type",
    "max_grad_norm",
    "optim",
    "warmup_steps",
    "weight_decay",
)
BITSANDBYTES_OPTIMIZERS = (
    "adamw_8bit",
    "adamw_bnb_8bit",
    "lion_32bit",
    "lion_8bit",
    "paged_adamw_32bit",
    "paged_adamw_8bit",
)
SCHEDULE_FREE_OPTIMIZERS = ("schedule_free_adamw", "schedule_free_radam", "schedule_free_sgd")
OPTIMIZERS = (
    "adafactor",
    "adagrad",
    "adamw_torch",
    "adamw_torch_fused",
    "rmsprop",
    "sgd",
    *BITSANDBYTES_OPTIMIZERS,
    *SCHEDULE_FREE_OPTIMIZERS,
)
"""Those of torch, transformers, bitsandbytes and schedulefree that work without further arguments."""
SCHEDULES = (
    "constant",
    "constant_with_warmup",
    "cosine",
    "cosine_with_restarts",
    "inverse_sqrt",
    "linear",
    "polynomial",
)
"""Functions of the step that need no further arguments."""
_TRAINING: dict[str, Range] = {
    "adam_beta1": Number(0, 1, below=True),
    "adam_beta2": Number(0, 1, below=True),
    "adam_epsilon": Number(0, 1, above=True),
    "learning_rate": Number(0, 1000, above=True),
    "lr_scheduler_type": OneOf(SCHEDULES),
    "max_grad_norm": Number(),
    "optim": OneOf(OPTIMIZERS),
    "warmup_steps": Whole(0, MAX_STEPS),
    "weight_decay": Number(0, 1000),
    "optimizer_state": OneOf(OPTIMIZER_STATES),
    "refresh_steps": Whole(1, MAX_STEPS),
    "rho": Number(0, 1, below=True),
}
SHARED_TRAINING = tuple(_TRAINING)
"""Those, and how Fisher information and the optimizer's moments are carried on."""
CLIENT_DEFAULTS = ("gradient_accumulation_steps", "per_device_train_batch_size")
SHARED_DATA = ("format", "max_length")
"""What of the data section is shared. Path, columns and all else that chooses among a client's data is its own."""


@dataclass(frozen=True)
class FederationSpec:
    """What the clients of a federation share.

    Attributes:
        name: how reports call it.
        model: Hub id or path of the base model.
        base_fingerprint: what identifies the base (`fedfstq_hf.adapter.base_fingerprint`), compared by each client.
        schema: fingerprint of the adapter's names, shapes and dtypes.
        rounds: aggregations until the federation ends.
        local_steps: optimizer steps of a client per round (E).
        max_message_bytes: larger messages are refused unread.
        method: codec, objective, server optimizer and all other switches (`fedfstq_hf.methods`).
        num_clients: all clients of the federation, where the method needs to know (SCAFFOLD's N).
        mean_examples: of a client, where its budget follows its examples (`budget_share`).
        min_clients: updates that close a round.
        clients_per_round: how many of the enrolled clients are asked for an update in each round; None for all.
        round_seconds: a round closes after this time even with fewer updates (at least one); None waits for ever.
        training: shared `TrainingArguments` (`SHARED_TRAINING_ARGUMENTS`), and how Fisher information and
            optimizer moments are carried on (`optimizer_state`, `refresh_steps`, `rho`).
        client_defaults: batch size and accumulation that `fedfstq train` starts from; each client may choose others.
        data: `{"format": ..., "max_length": ...}`: the format of the founder's examples, which clients are told and
            nothing more, and how many tokens `fedfstq train` cuts an example to.
        seed: of data order and dropout, together with client id and round.
        signatures: True refuses updates without a valid signature of an enrolled key.
        founder_key: public key whose holder signs each round's record; clients refuse records without. None for none.
        sealing_key: public key that clients seal their messages to; None sends them readable.
        share_saliency: clients that agree may send their token sensitivities, which are published in aggregate.
        package_version: of the founder.
        salt: drawn when the federation is founded, so that no two of the same settings have the same `id`.
    """

    name: str
    model: str
    base_fingerprint: Mapping[str, Any]
    schema: str
    rounds: int
    local_steps: int
    max_message_bytes: int
    method: MethodSettings = field(default_factory=MethodSettings)
    num_clients: int | None = None
    mean_examples: int | None = None
    min_clients: int = 1
    clients_per_round: int | None = None
    round_seconds: float | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    client_defaults: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    signatures: bool = False
    founder_key: str | None = None
    sealing_key: str | None = None
    share_saliency: bool = False
    package_version: str = __version__
    salt: str = field(default_factory=lambda: secrets.token_hex(16))

    def __post_init__(self) -> None:
        if type(self.method) is not MethodSettings:
            object.__setattr__(self, "method", MethodSettings.from_dict(self.method))
        _check_types(self)
        _check_base_fingerprint(self.base_fingerprint)
        _check_training(self.training)
        _check_client_defaults(self.client_defaults)
        _check_shared_data(self.data)
        if self.clients_per_round is not None and self.clients_per_round < self.min_clients:
            raise ConfigError(
                f"clients_per_round is {self.clients_per_round}, but min_clients = {self.min_clients} updates close a "
                "round: no round could ever close. Ask at least min_clients clients."
            )
        if self.method.scaffold and self.num_clients is None:
            raise ConfigError("SCAFFOLD divides by the number of all clients: say num_clients.")
        if self.method.budget_by_examples and self.mean_examples is None:
            raise ConfigError("budget_by_examples compares clients with their mean: say mean_examples.")
        if self.founder_key is not None:
            parse_public_key(self.founder_key, "ed25519")
        if self.sealing_key is not None:
            parse_public_key(self.sealing_key, "x25519")
        _ = self.feedback_decay  # builds the codec with its options
        for budget in (self.downlink.keyframe, self.downlink.step):
            try:
                _ = None if budget is None else parse_budget(budget, 10**12)
            except BudgetError as error:
                raise ConfigError(f"method.downlink: {error}") from None

    @property
    def optimizer_state(self) -> str:
        """`"fresh"` restarts the client's optimizer in each round, `"kept"` carries its moments on."""
        return str(self.training.get("optimizer_state", "fresh"))

    @property
    def refresh_steps(self) -> int:
        """Token sensitivity is read off every that many local steps (H)."""
        return int(self.training.get("refresh_steps", 10))

    @property
    def rho(self) -> float:
        """Decay of the two Fisher averages."""
        return float(self.training.get("rho", 0.9))

    @property
    def training_arguments(self) -> dict[str, Any]:
        """Of `training`, the values for `TrainingArguments`."""
        return {name: self.training[name] for name in SHARED_TRAINING_ARGUMENTS if name in self.training}

    @cached_property
    def feedback_decay(self) -> float:
        """Decay of the residual that a client carries to its next update; 0 for none.

        Where a refinement says what its preview left out, nothing is left for a residual.
        """
        codec = get_codec(self.method.codec, **self.method.codec_options)
        decay = feedback_decay(self.method.error_feedback, codec=codec.name, unbiased=codec.unbiased)
        return decay if self.method.refinement_budget is None else 0.0

    @property
    def patience(self) -> float:
        """Seconds for which a mailbox that does not answer is asked again: for ever where no deadline closes rounds."""
        return math.inf if self.round_seconds is None else UNATTENDED_SECONDS

    @property
    def forwards(self) -> bool:
        """Whether clients may get each other's messages, which everybody can read in the mailbox anyway."""
        return self.sealing_key is None

    @cached_property
    def downlink(self) -> DownlinkSettings:
        """How the next adapter is published for download."""
        exact = self.clients_per_round is None and self.forwards
        return self.method.downlink or default_downlink(self.method.codec, exact=exact)

    @cached_property
    def id(self) -> str:
        """Hex sha256 over the canonical JSON of all fields: who copies a federation's id copies all of its settings.

        Signatures are good for one id. Client states belong to one.
        """
        content = json.dumps(self._fields(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(b"fedfstq federation\n" + content.encode()).hexdigest()

    def trained_part(self, schema: Schema) -> TrainedPart:
        """What of an adapter with that schema is trained and travels."""
        return TrainedPart.of(schema, freeze_a=self.method.freeze_a)

    def budget_share(self, num_examples: int) -> float:
        """Size of the payload of a client with so many examples, relative to what the budget leaves for it.

        The noise of a message enters the round's mean with its weight squared, so a client that weighs more should say
        more: in proportion to its weight, for the least noise of one round. But a round's weights are relative to who
        else is in it, and a large client may have a slow link. The square root of its number of examples comes close to
        the least noise on average, has less in the worst round, and a largest message of half the size.
        """
        if self.mean_examples is None:
            return 1.0
        return math.sqrt(min(num_examples / self.mean_examples, self.method.weight_cap or math.inf))

    def refines(self, round: int) -> bool:
        """Whether messages of `round` are previews, whose refinements follow; those of the last round never are."""
        rounds = self.method.preview_rounds
        last = self.rounds - 1 if rounds is None else min(rounds, self.rounds - 1)
        return self.method.refinement_budget is not None and round < last

    def _fields(self) -> dict[str, Any]:
        fields = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return fields | {"method": self.method.to_dict(), "format": FORMAT}

    def to_json(self) -> bytes:
        """Readable JSON with sorted keys, `id` among them."""
        fields = {**self._fields(), "id": self.id}
        return (json.dumps(fields, indent=1, sort_keys=True) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes) -> FederationSpec:
        """Parse `spec.json`, of at most `MAX_SPEC_BYTES`.

        Raises:
            MailboxError: it is of another format, lacks fields, has unknown ones or values out of range, or its `id`
                is not that of its content.
        """
        fields = parse_object(data, "The mailbox's spec", max_bytes=MAX_SPEC_BYTES)
        if fields.get("format") != FORMAT:
            raise other_version("spec", fields, FORMAT)
        stored = fields.pop("id", None)
        del fields["format"]
        known = {item.name: item for item in dataclasses.fields(cls)}
        if unknown := sorted(set(fields) - set(known)):
            raise MailboxError(f"The mailbox's spec cannot be read: unknown field {printable(unknown[0], 80)}.")
        for name, item in known.items():
            required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
            if required and name not in fields:
                raise MailboxError(f"The mailbox's spec cannot be read: it lacks {name}.")
        try:
            spec = cls(**fields)
        except ConfigError as error:
            raise MailboxError(f"The mailbox's spec cannot be read: {printable(error, 1000)}") from error
        if stored != spec.id:
            shown = printable(repr(stored), 80)
            raise MailboxError(
                f"The mailbox's spec says that its id is {shown}, but its content has id {spec.id}: it was altered "
                "after the founding, or has the id of another federation. Ask who founded it."
            )
        return spec


def _check_types(spec: object) -> None:
    """Refuse fields of a spec that are of another type than theirs, not finite, too large or too long.

    Raises:
        ConfigError: naming the field, what it is and what it may be.
    """
    for name, range in _FIELDS.items():
        range.check(name, getattr(spec, name))


def _check_training(training: Mapping[str, Any]) -> None:
    """Refuse shared settings of training that are not shared, of another type, or out of range.

    Raises:
        ConfigError: naming the argument.
    """
    for name, value in training.items():
        if name not in _TRAINING:
            raise ConfigError(
                f"training.{printable(name, 80)} cannot be shared by a federation; it can share {', '.join(_TRAINING)}."
            )
        _TRAINING[name].check(f"training.{name}", value)


def _check_client_defaults(defaults: Mapping[str, Any]) -> None:
    """Refuse suggestions for a client's `TrainingArguments` that are no batch sizes.

    Raises:
        ConfigError: naming the argument.
    """
    for name, value in defaults.items():
        if name not in CLIENT_DEFAULTS:
            raise ConfigError(
                f"client_defaults.{printable(name, 80)} is each client's own decision; a federation can suggest "
                f"{' and '.join(CLIENT_DEFAULTS)}."
            )
        Whole(1, MAX_BATCH).check(f"client_defaults.{name}", value)


def _check_shared_data(data: Mapping[str, Any]) -> None:
    """Refuse fields of a data section that choose among a client's data.

    Raises:
        ConfigError: naming the field.
    """
    for name in data:
        if name not in SHARED_DATA:
            raise ConfigError(
                f"data.{printable(name, 80)} is each client's own decision; a federation can share "
                f"{' and '.join(SHARED_DATA)}."
            )
    if "format" in data:
        Text(64).check("data.format", data["format"])
    if "max_length" in data:
        Whole(8, MAX_TOKENS).check("data.max_length", data["max_length"])


def _check_base_fingerprint(fingerprint: Mapping[str, Any]) -> None:
    """Refuse a fingerprint whose embedding probe is no list of numbers.

    Raises:
        ConfigError: naming the field.
    """
    probe = fingerprint.get("embedding_probe", [])
    if not isinstance(probe, (list, tuple)) or not all(is_number(value, LARGEST) for value in probe):
        raise ConfigError(f"base_fingerprint.embedding_probe must be a list of numbers, not {shown(probe)}.")
