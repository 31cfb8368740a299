"""What a federation's spec may ask of its clients: types and largest values, checked before anything is made of them.

A spec comes from a mailbox, and a mailbox from anybody. Nothing of what passes here names a token, a module, a plugin
or a place to write to, and it costs no memory to hold. Ranges that belong to one feature stand with the feature
(`fedfstq_hf.switches` and its like).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from fedfstq_hf.codec import get_codec
from fedfstq_hf.errors import ConfigError
from fedfstq_hf.text import printable

MAX_SPEC_BYTES = 1 << 16
MAX_STEPS = 10**6
MAX_CLIENTS = 10**6
MAX_MESSAGE_BYTES = 2**32
MAX_BATCH = 4096
MAX_TOKENS = 1 << 20

_WHOLE: dict[str, tuple[int, int]] = {
    "rounds": (1, MAX_STEPS),
    "local_steps": (1, MAX_STEPS),
    "refresh_steps": (1, MAX_STEPS),
    "tag_every": (1, MAX_STEPS),
    "min_clients": (1, MAX_CLIENTS),
    "max_message_bytes": (1, MAX_MESSAGE_BYTES),
    "max_staleness": (0, MAX_STEPS),
    "token_merge_layer": (0, 10_000),
    "seed": (0, 2**63 - 1),
    "format": (0, 10_000),
}
_WHOLE_OR_NONE: dict[str, tuple[int, int]] = {
    "clients_per_round": (1, MAX_CLIENTS),
    "scaffold_clients": (1, MAX_CLIENTS),
    "preview_rounds": (1, MAX_STEPS),
    "mean_examples": (1, 10**12),
}
_NUMBERS = (
    "preview_step",
    "preview_correction",
    "error_feedback",
    "rho",
    "token_keep_ratio",
    "proximal_mu",
    "coverage",
    "binarisation_warmup",
    "binarisation_rho",
    "token_merge_ratio",
    "staleness_discount",
)
_NUMBERS_OR_NONE = ("round_seconds", "clip", "weight_cap")
_LARGEST = 1e9
_SWITCHES = ("freeze_a", "learned_binarisation", "signatures", "share_saliency")
_TEXTS = {
    "name": 200,
    "model": 300,
    "schema": 64,
    "codec": 64,
    "optimizer_state": 64,
    "objective": 64,
    "fisher": 64,
    "fisher_objective": 64,
    "weights": 64,
    "package_version": 64,
    "salt": 64,
}
_BUDGETS = ("uplink_budget", "refinement_budget")
_BUDGET_LENGTH = 100
_MAPPINGS = ("base_fingerprint", "codec_options", "server", "training", "data", "client_defaults")
_ENTRIES, _KEY_LENGTH, _TEXT_LENGTH = 64, 64, 200

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
_TRAINING_NAMES = {"optim": OPTIMIZERS, "lr_scheduler_type": SCHEDULES}
_TRAINING_NUMBERS = {
    "adam_beta1": (0.0, 1.0),
    "adam_beta2": (0.0, 1.0),
    "adam_epsilon": (0.0, 1.0),
    "learning_rate": (0.0, 1000.0),
    "max_grad_norm": (0.0, _LARGEST),
    "weight_decay": (0.0, 1000.0),
}
_BELOW_ITS_END = ("adam_beta1", "adam_beta2")
_ABOVE_ZERO = ("adam_epsilon", "learning_rate")
CLIENT_DEFAULTS = ("gradient_accumulation_steps", "per_device_train_batch_size")
SHARED_DATA = ("format", "max_length")
"""What of the data section is shared. Path, columns and all else that chooses among a client's data is its own."""


def check_types(spec: object) -> None:
    """Refuse fields of a spec that are of another type than theirs, not finite, too large or too long.

    Raises:
        ConfigError: naming the field, what it is and what it may be.
    """
    fields = vars(spec)
    for name, (low, high) in _WHOLE.items():
        check_whole(name, fields[name], low, high)
    for name, (low, high) in _WHOLE_OR_NONE.items():
        if fields[name] is not None:
            check_whole(name, fields[name], low, high)
    for name in _NUMBERS:
        _check_number(name, fields[name], -_LARGEST, _LARGEST)
    for name in _NUMBERS_OR_NONE:
        if fields[name] is not None:
            _check_number(name, fields[name], -_LARGEST, _LARGEST)
    for name in _SWITCHES:
        if not isinstance(fields[name], bool):
            raise ConfigError(f"{name} must be true or false, not {_shown(fields[name])}.")
    for name, length in _TEXTS.items():
        _check_text(name, fields[name], length)
    if fields["sealing_key"] is not None:
        _check_text("sealing_key", fields["sealing_key"], _TEXT_LENGTH)
    for name in _BUDGETS:
        if isinstance(fields[name], str):
            _check_text(name, fields[name], _BUDGET_LENGTH)
        elif fields[name] is not None:
            check_whole(name, fields[name], 1, MAX_MESSAGE_BYTES)
    for name in _MAPPINGS:
        _check_mapping(name, fields[name])


def check_codec(name: str, options: Mapping[str, Any]) -> None:
    """Refuse a codec that does not exist, and options that it does not take; nothing is allocated for it.

    Raises:
        ConfigError: naming the codec and the option.
    """
    get_codec(name, **options)


def check_training(training: Mapping[str, Any]) -> None:
    """Refuse shared `TrainingArguments` that are not shared, of another type, or out of range.

    Raises:
        ConfigError: naming the argument.
    """
    for name, value in training.items():
        if name in _TRAINING_NAMES:
            if value not in _TRAINING_NAMES[name]:
                raise ConfigError(
                    f"training.{name} must be one of {', '.join(_TRAINING_NAMES[name])}, not {_shown(value)}."
                )
        elif name == "warmup_steps":
            check_whole("training.warmup_steps", value, 0, MAX_STEPS)
        elif name in _TRAINING_NUMBERS:
            low, high = _TRAINING_NUMBERS[name]
            _check_number(f"training.{name}", value, low, high)
            if (name in _ABOVE_ZERO and value == low) or (name in _BELOW_ITS_END and value == high):
                side = f"above {low:g}" if name in _ABOVE_ZERO else f"below {high:g}"
                raise ConfigError(f"training.{name} must be {side}, not {_shown(value)}.")
        else:
            raise ConfigError(
                f"training.{printable(name, 80)} cannot be shared by a federation; it can share "
                f"{', '.join(SHARED_TRAINING_ARGUMENTS)}."
            )


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
        check_whole(f"client_defaults.{name}", value, 1, MAX_BATCH)


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
        _check_text("data.format", data["format"], 64)
    if "max_length" in data:
        check_whole("data.max_length", data["max_length"], 8, MAX_TOKENS)


def check_base_fingerprint(fingerprint: Mapping[str, Any]) -> None:
    """Refuse a fingerprint whose embedding probe is no list of numbers.

    Raises:
        ConfigError: naming the field.
    """
    probe = fingerprint.get("embedding_probe", [])
    if not isinstance(probe, (list, tuple)) or not all(_is_number(value, _LARGEST) for value in probe):
        raise ConfigError(f"base_fingerprint.embedding_probe must be a list of numbers, not {_shown(probe)}.")


def check_whole(name: str, value: object, low: int, high: int) -> None:
    """Refuse what is no whole number from `low` to `high`; true and 1.0 are none.

    Raises:
        ConfigError: naming it.
    """
    if type(value) is not int or value < low:
        raise ConfigError(f"{name} must be a whole number of at least {low}, not {_shown(value)}.")
    if value > high:
        raise ConfigError(f"{name} must be at most {high}, not {_shown(value)}.")


def _check_number(name: str, value: object, low: float, high: float) -> None:
    if not _is_number(value) or not low <= value <= high:  # type: ignore[operator]
        raise ConfigError(f"{name} must be a number from {low:g} to {high:g}, not {_shown(value)}.")


def _is_number(value: object, largest: float = sys.float_info.max) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= largest  # NaN is not


def _check_text(name: str, value: object, length: int) -> None:
    if not isinstance(value, str) or len(value) > length:
        raise ConfigError(f"{name} must be text of at most {length} characters, not {_shown(value)}.")


def _check_mapping(name: str, value: object) -> None:
    if not isinstance(value, Mapping) or len(value) > _ENTRIES:
        raise ConfigError(f"{name} must be a mapping of at most {_ENTRIES} names to values, not {_shown(value)}.")
    for key, item in value.items():
        if not isinstance(key, str) or len(key) > _KEY_LENGTH:
            raise ConfigError(f"{name} has the key {_shown(key)}; expected a name of at most {_KEY_LENGTH} characters.")
        several = isinstance(item, (list, tuple)) and len(item) <= _ENTRIES
        if not all(_is_plain(part) for part in (item if several else [item])):
            raise ConfigError(f"{name}.{printable(key, 80)} must be one plain value or a short list: {_shown(item)}.")


def _is_plain(value: object) -> bool:
    return (
        value is None
        or isinstance(value, bool)
        or (isinstance(value, str) and len(value) <= _TEXT_LENGTH)
        or (isinstance(value, int) and abs(value) < 2**64)
        or _is_number(value)
    )


def _shown(value: object) -> str:
    return printable(repr(value), 80)
