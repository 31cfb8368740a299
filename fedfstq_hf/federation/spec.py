"""The federation's spec: what all its clients share. Published once, with round 0; it wins over a client's settings."""

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
from fedfstq_hf.errors import ConfigError, MailboxError
from fedfstq_hf.federation import limits
from fedfstq_hf.federation.keys import parse_public_key
from fedfstq_hf.federation.record import other_version
from fedfstq_hf.federation.trained_part import TrainedPart
from fedfstq_hf.federation.untrusted import parse_object
from fedfstq_hf.methods import MethodSettings, feedback_decay
from fedfstq_hf.text import printable

FORMAT = 4


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
        training: shared `TrainingArguments` (`limits.SHARED_TRAINING_ARGUMENTS`), and how Fisher information and
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
        limits.check_types(self)
        limits.check_base_fingerprint(self.base_fingerprint)
        limits.check_training(self.training)
        limits.check_client_defaults(self.client_defaults)
        limits.check_shared_data(self.data)
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
        return {name: self.training[name] for name in limits.SHARED_TRAINING_ARGUMENTS if name in self.training}

    @cached_property
    def feedback_decay(self) -> float:
        """Decay of the residual that a client carries to its next update; 0 for none.

        Where a refinement says what its preview left out, nothing is left for a residual.
        """
        codec = get_codec(self.method.codec, **self.method.codec_options)
        decay = feedback_decay(self.method.error_feedback, codec=codec.name, unbiased=codec.unbiased)
        return decay if self.method.refinement_budget is None else 0.0

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
        """Parse `spec.json`, of at most `limits.MAX_SPEC_BYTES`.

        Raises:
            MailboxError: it is of another format, lacks fields, has unknown ones or values out of range, or its `id`
                is not that of its content.
        """
        fields = parse_object(data, "The mailbox's spec", max_bytes=limits.MAX_SPEC_BYTES)
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
