"""What a federation's spec may ask of its clients: types and largest values, checked before anything is made of them.

A spec comes from a mailbox, and a mailbox from anybody. Nothing of what passes here names a token, a module, a plugin
or a place to write to, and it costs no memory to hold. Ranges that belong to one feature stand with the feature
(`fedfstq_hf.methods`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedfstq_hf.errors import ConfigError
from fedfstq_hf.methods import OPTIMIZER_STATES
from fedfstq_hf.ranges import LARGEST, Flag, Number, OneOf, Options, OrNone, Range, Text, Whole, is_number, shown
from fedfstq_hf.text import printable

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
OPTIMIZERS = (
    "adafactor",
    "adagrad",
    "adamw_torch",
    "adamw_torch_fused",
    "rmsprop",
    "sgd",
    *BITSANDBYTES_OPTIMIZERS,
)
"""Those of torch, transformers and bitsandbytes that work without further arguments."""
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


def check_types(spec: object) -> None:
    """Refuse fields of a spec that are of another type than theirs, not finite, too large or too long.

    Raises:
        ConfigError: naming the field, what it is and what it may be.
    """
    for name, range in _FIELDS.items():
        range.check(name, getattr(spec, name))


def check_training(training: Mapping[str, Any]) -> None:
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


def check_client_defaults(defaults: Mapping[str, Any]) -> None:
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


def check_shared_data(data: Mapping[str, Any]) -> None:
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


def check_base_fingerprint(fingerprint: Mapping[str, Any]) -> None:
    """Refuse a fingerprint whose embedding probe is no list of numbers.

    Raises:
        ConfigError: naming the field.
    """
    probe = fingerprint.get("embedding_probe", [])
    if not isinstance(probe, (list, tuple)) or not all(is_number(value, LARGEST) for value in probe):
        raise ConfigError(f"base_fingerprint.embedding_probe must be a list of numbers, not {shown(probe)}.")
