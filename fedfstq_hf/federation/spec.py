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
from fedfstq_hf.codec import Schema
from fedfstq_hf.errors import ConfigError, MailboxError
from fedfstq_hf.federation import limits
from fedfstq_hf.federation.keys import parse_public_key
from fedfstq_hf.federation.record import other_version
from fedfstq_hf.federation.travelling import Travelling
from fedfstq_hf.federation.turns import Turn, turn_of
from fedfstq_hf.federation.untrusted import parse_object
from fedfstq_hf.sensitivity.options import check_fisher, check_objective
from fedfstq_hf.switches import check_coverage, check_freeze_a, check_refinement, check_switches, check_weights
from fedfstq_hf.text import printable

FORMAT = 3


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
        mean_examples: where set, budgets are those of a client with so many examples, and another's grow with the
            square root of its own number (`budget_share`).
        refinement_budget: default budget of a second message of each client and round, which says the whole update
            again, better, and is sent while the next round's clients train (`federation.refining`); None for none.
        preview_step: what the first message counts for until then, as a share of the server's step.
        preview_correction: how much of what the first message got wrong is then taken back, as a share.
        preview_rounds: rounds that begin with previews; messages of later ones are as long as refinements, and waited
            for. None for all rounds but the last.
        error_feedback: decay of the residual that a client carries to its next update; 0 switches it off.
        max_message_bytes: larger messages are refused unread.
        server: `{"optimizer": any torch.optim class, "lr": ..., ...}` on the pseudo-gradient; SGD with lr 1 is FedAvg.
        training: values for `limits.SHARED_TRAINING_ARGUMENTS`.
        optimizer_state: `"fresh"` restarts the client's optimizer in each round, `"kept"` carries its moments on.
        refresh_steps: token sensitivity is read off every that many local steps (H).
        rho: decay of the two Fisher averages.
        objective: what target tokens weigh in the local loss between refresh steps (`sensitivity.options.OBJECTIVES`).
        token_keep_ratio: share of the target tokens that the objectives `hard` and `unbiased` keep.
        fisher: source of the adapter's Fisher information (`sensitivity.options.FISHER_SOURCES`).
        fisher_objective: whose gradients it is of (`sensitivity.options.FISHER_OBJECTIVES`).
        proximal_mu: FedProx's pull towards the adapter that the round started from; 0 for none.
        freeze_a: LoRA's factors A stay as round 0 has them; only the changes of B travel.
        coverage: share of the travelling tensors that one message is about; a round's clients take turns (turns.py).
        scaffold_clients: N, the number of all clients, of a federation with SCAFFOLD's control variates; None for none.
        learned_binarisation, binarisation_warmup, binarisation_rho: FedBAT's training (`fedfstq_hf.switches`).
        token_merge_ratio, token_merge_layer: Fed-ToMe's (likewise).
        seed: of data order and dropout, together with client id and round.
        data: `{"format": ..., "max_length": ...}`: the format of the founder's examples, which clients are told and
            nothing more, and how many tokens `fedfstq train` cuts an example to.
        client_defaults: batch size and accumulation that `fedfstq train` starts from; each client may choose others.
        clients_per_round: how many of the enrolled clients are asked for an update in each round; None for all.
        max_staleness: a late update is still used up to that many rounds after its own; 0 refuses all late ones.
        staleness_discount: factor on the weight of an update per round of its staleness.
        weights: what an update weighs in the mean, one of `WEIGHTS`.
        clip: an update whose norm exceeds that many times the round's median norm is scaled down to it; None for none.
            `federation.clipping` says what holds where most messages of a round say nothing.
        weight_cap: an update weighs at most that many times the round's median; None for no cap.
        signatures: True refuses updates without a valid signature of an enrolled key.
        founder_key: public key whose holder signs each round's record; clients refuse records without. None for none.
        sealing_key: public key that clients seal their messages to; None sends them readable.
        tag_every: the Hub repo is tagged at every that many rounds.
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
    min_clients: int = 1
    round_seconds: float | None = None
    codec: str = "fstq"
    codec_options: Mapping[str, Any] = field(default_factory=dict)
    uplink_budget: str | int | None = None
    mean_examples: int | None = None
    refinement_budget: str | int | None = None
    preview_step: float = 1.0
    preview_correction: float = 1.0
    preview_rounds: int | None = None
    error_feedback: float = 1.0
    server: Mapping[str, Any] = field(default_factory=lambda: {"optimizer": "SGD", "lr": 1.0})
    training: Mapping[str, Any] = field(default_factory=dict)
    optimizer_state: str = "fresh"
    refresh_steps: int = 10
    rho: float = 0.9
    objective: str = "full"
    token_keep_ratio: float = 0.5
    fisher: str = "gradients"
    fisher_objective: str = "same"
    proximal_mu: float = 0.0
    freeze_a: bool = False
    coverage: float = 1.0
    scaffold_clients: int | None = None
    learned_binarisation: bool = False
    binarisation_warmup: float = 0.5
    binarisation_rho: float = 6.0
    token_merge_ratio: float = 0.0
    token_merge_layer: int = 1
    seed: int = 0
    data: Mapping[str, Any] = field(default_factory=dict)
    client_defaults: Mapping[str, Any] = field(default_factory=dict)
    clients_per_round: int | None = None
    max_staleness: int = 0
    staleness_discount: float = 0.5
    weights: str = "examples"
    clip: float | None = 10.0
    weight_cap: float | None = 10.0
    signatures: bool = False
    founder_key: str | None = None
    sealing_key: str | None = None
    tag_every: int = 10
    share_saliency: bool = False
    package_version: str = __version__
    salt: str = field(default_factory=lambda: secrets.token_hex(16))
    format: int = FORMAT

    def __post_init__(self) -> None:
        limits.check_types(self)
        limits.check_base_fingerprint(self.base_fingerprint)
        limits.check_training(self.training)
        limits.check_client_defaults(self.client_defaults)
        limits.check_shared_data(self.data)
        limits.check_codec(self.codec, self.codec_options)
        if self.round_seconds is not None and self.round_seconds <= 0:
            raise ConfigError(
                f"round_seconds must be a positive number of seconds or null, not {self.round_seconds!r}."
            )
        if not 0 <= self.error_feedback <= 1:
            raise ConfigError(f"error_feedback must lie in [0, 1] (0 switches it off), not {self.error_feedback!r}.")
        if not 0 <= self.rho < 1:
            raise ConfigError(f"rho must lie in [0, 1), not {self.rho!r}.")
        if self.clients_per_round is not None and self.clients_per_round < self.min_clients:
            raise ConfigError(
                f"clients_per_round is {self.clients_per_round}, but min_clients = {self.min_clients} updates close a "
                "round: no round could ever close. Ask at least min_clients clients."
            )
        if not 0 < self.staleness_discount <= 1:
            raise ConfigError(f"staleness_discount must lie in (0, 1], not {self.staleness_discount!r}.")
        for name in ("clip", "weight_cap"):
            limit = getattr(self, name)
            if limit is not None and limit < 1:
                raise ConfigError(f"{name} is a multiple of the round's median: at least 1, or null; not {limit!r}.")
        if self.founder_key is not None:
            parse_public_key(self.founder_key, "ed25519")
        if self.sealing_key is not None:
            parse_public_key(self.sealing_key, "x25519")
        check_objective(self.objective, self.token_keep_ratio)
        check_fisher(self.fisher, self.fisher_objective, self.objective, self.proximal_mu)
        check_switches(self, scaffold=self.scaffold_clients is not None)
        check_freeze_a(
            self.freeze_a, scaffold=self.scaffold_clients is not None, learned_binarisation=self.learned_binarisation
        )
        check_coverage(self.coverage, scaffold=self.scaffold_clients is not None)
        check_weights(self.weights, scaffold=self.scaffold_clients is not None, coverage=self.coverage)
        check_refinement(
            self.refinement_budget,
            self.preview_step,
            self.preview_correction,
            self.preview_rounds,
            error_feedback=self.error_feedback,
            scaffold=self.scaffold_clients is not None,
            coverage=self.coverage,
        )
        if self.refinement_budget is not None and self.max_staleness:
            raise ConfigError("refinement_budget and max_staleness cannot be combined: leave one of them out.")
        if self.optimizer_state not in ("fresh", "kept"):
            raise ConfigError(f"optimizer_state must be 'fresh' or 'kept', not {self.optimizer_state!r}.")

    @cached_property
    def id(self) -> str:
        """Hex sha256 over the canonical JSON of all fields: who copies a federation's id copies all of its settings.

        Signatures are good for one id. Client states belong to one.
        """
        content = json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(b"fedfstq federation\n" + content.encode()).hexdigest()

    def travelling(self, schema: Schema) -> Travelling:
        """What of an adapter with that schema travels."""
        return Travelling.of(schema, freeze_a=self.freeze_a)

    def budget_share(self, num_examples: int) -> float:
        """Size of the payload of a client with so many examples, relative to what the budget leaves for it.

        The noise of a message enters the round's mean with its weight squared, so a client that weighs more should say
        more: in proportion to its weight, for the least noise of one round. But a round's weights are relative to who
        else is in it, and a large client may have a slow link. The square root of its number of examples comes close to
        the least noise on average, has less in the worst round, and a largest message of half the size.
        """
        if self.mean_examples is None:
            return 1.0
        return math.sqrt(min(num_examples / self.mean_examples, self.weight_cap or math.inf))

    def refines(self, round: int) -> bool:
        """Whether messages of `round` are previews, whose refinements follow; those of the last round never are."""
        last = self.rounds - 1 if self.preview_rounds is None else min(self.preview_rounds, self.rounds - 1)
        return self.refinement_budget is not None and round < last

    def turn(self, schema: Schema, client_id: str, round: int) -> Turn:
        """What a client's message of a round is about, of what travels (`schema`)."""
        return turn_of(schema, self.coverage, seed=self.seed, client_id=client_id, round=round)

    def to_json(self) -> bytes:
        """Readable JSON with sorted keys, `id` among them."""
        fields = {**dataclasses.asdict(self), "id": self.id}
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
