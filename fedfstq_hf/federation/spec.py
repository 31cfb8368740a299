"""The federation's spec: what all its clients share. Published once, with round 0; it wins over a client's settings."""

from __future__ import annotations

import dataclasses
import json
import math
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedfstq_hf.errors import ConfigError, MailboxError

FORMAT = 1

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
        min_clients: updates that close a round.
        round_seconds: a round closes after this time even with fewer updates (at least one); None waits for ever.
        codec, codec_options: how updates travel.
        uplink_budget: default budget of a message (`"96kB"`, `"0.3bpp"`, `"5s@2Mbps"`), None for no limit.
        error_feedback: decay of the residual that a client carries to its next update; 0 switches it off.
        max_message_bytes: larger messages are refused unread.
        server: `{"optimizer": any torch.optim class, "lr": ..., ...}` on the pseudo-gradient; SGD with lr 1 is FedAvg.
        training: values for `SHARED_TRAINING_ARGUMENTS`.
        optimizer_state: `"fresh"` restarts the client's optimizer in each round, `"kept"` carries its moments on.
        refresh_steps: token sensitivity is read off every that many local steps (H).
        rho: decay of the two Fisher averages.
        seed: of data order and dropout, together with client id and round.
        data: how clients format their examples (the data section of the recipe), for `fedfstq train`.
        client_defaults: `TrainingArguments` that `fedfstq train` starts from; each client may choose others.
        id: drawn when the federation is founded, so that no client brings the state of another one of the same shape.
    """

    name: str
    model: str
    base_fingerprint: Mapping[str, Any]
    schema: str
    rounds: int
    local_steps: int
    max_message_bytes: int
    min_clients: int = 1
    round_seconds: float | None = None
    codec: str = "fstq"
    codec_options: Mapping[str, Any] = field(default_factory=dict)
    uplink_budget: str | int | None = None
    error_feedback: float = 1.0
    server: Mapping[str, Any] = field(default_factory=lambda: {"optimizer": "SGD", "lr": 1.0})
    training: Mapping[str, Any] = field(default_factory=dict)
    optimizer_state: str = "fresh"
    refresh_steps: int = 10
    rho: float = 0.9
    seed: int = 0
    data: Mapping[str, Any] = field(default_factory=dict)
    client_defaults: Mapping[str, Any] = field(default_factory=dict)
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    format: int = FORMAT

    def __post_init__(self) -> None:
        for name in ("rounds", "local_steps", "min_clients", "refresh_steps", "max_message_bytes"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ConfigError(f"{name} must be a whole number of at least 1, not {getattr(self, name)!r}.")
        if self.round_seconds is not None and not (0 < self.round_seconds < math.inf):
            raise ConfigError(
                f"round_seconds must be a positive number of seconds or null, not {self.round_seconds!r}."
            )
        if not 0 <= self.error_feedback <= 1:
            raise ConfigError(f"error_feedback must lie in [0, 1] (0 switches it off), not {self.error_feedback!r}.")
        if self.optimizer_state not in ("fresh", "kept"):
            raise ConfigError(f"optimizer_state must be 'fresh' or 'kept', not {self.optimizer_state!r}.")
        if unknown := sorted(set(self.training) - set(SHARED_TRAINING_ARGUMENTS)):
            raise ConfigError(
                f"training.{unknown[0]} cannot be shared by a federation; it can share "
                f"{', '.join(SHARED_TRAINING_ARGUMENTS)}."
            )

    def to_json(self) -> bytes:
        """Readable JSON with sorted keys."""
        return (json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes) -> FederationSpec:
        """Parse `spec.json`. Raises `MailboxError` for another format, unknown fields or impossible values."""
        try:
            fields = json.loads(data)
            if fields.get("format") != FORMAT:
                raise MailboxError(
                    f"The federation's spec has format {fields.get('format')!r}; this version reads format {FORMAT}. "
                    "Install the fedfstq_hf version that made the federation."
                )
            return cls(**fields)
        except (ValueError, TypeError, AttributeError) as error:
            raise MailboxError(f"The mailbox's spec cannot be read: {error}") from error
