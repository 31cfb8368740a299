"""Which frame of the downlink a round has: the server's side of `federation.frames`.

A lossy frame is coded so that the published adapter is what it decodes to, with what earlier frames left out added
before: Θ_{t+1} = Θ_0 + Q(Θ_t + step + residual - Θ_0). Clients then train from the very state that the server has. Were
they to start from a lossy copy of a state that stays exact, all would repair the same error, and the server would apply
the repair to a state that never had it (docs/experiments.md).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from fedfstq_hf.codec import Schema, get_codec
from fedfstq_hf.codec.budget import parse_budget
from fedfstq_hf.codec.schema import as_lora_b, is_lora_a
from fedfstq_hf.errors import MailboxError
from fedfstq_hf.federation import adapter_file
from fedfstq_hf.federation.frames import (
    CODEC,
    Share,
    pack_coded,
    pack_messages,
)
from fedfstq_hf.federation.mailbox.protocol import FRAME_FILE, RESIDUAL_FILE, Mailbox
from fedfstq_hf.federation.record import KEYFRAME, MESSAGES, STEP, Frame, RoundRecord
from fedfstq_hf.federation.spec import FederationSpec

_TENSOR = "residual"
_MAX_HEADER = 1000
_LEAST_WEIGHT = 1 / 16  # of the mean: what changes no product now decides how the next steps change it


@dataclass(frozen=True)
class Framed:
    """The next adapter, (num_params,) float32, and the frame that leads to it; None where only the plain file does.

    `residual`, (num_params,) float32, is what the adapter still lacks of the exact one; None for nothing.
    """

    adapter: Tensor
    residual: Tensor | None = None
    frame: Frame | None = None
    data: bytes = b""

    def files(self) -> dict[str, bytes]:
        """What is published of it beside the adapter."""
        made = {} if self.frame is None else {FRAME_FILE: self.data}
        return made if self.residual is None else made | {RESIDUAL_FILE: save({_TENSOR: self.residual})}


@dataclass(frozen=True)
class Framing:
    """Decides which frame the next round has, and makes it.

    Attributes:
        spec: of the federation.
        schema: of the whole adapter.
        record: of the open round.
        initial: Θ_0, (num_params,) float32.
        adapter: Θ_t likewise, as it is published.
    """

    spec: FederationSpec
    schema: Schema
    record: RoundRecord
    initial: Tensor
    adapter: Tensor

    def framed(self, change: Tensor, residual: Tensor | None, shares: Sequence[Share], *, last: bool = False) -> Framed:
        """The next round's frame.

        Args:
            change: the server's step, (num_params,) float32.
            residual: what earlier frames left out, likewise.
            shares: the messages that the step was made of, in their order; empty where nobody else may see them, or
                where the step does not follow from them alone.
            last: no round follows that could make up for what the frame leaves out: a keyframe is twice as large.
        """
        settings, round = self.spec.downlink, self.record.round + 1
        here: dict[str, Any] = {"round": round, "base": self.record.adapter_digest, "schema": self.schema}
        data = pack_messages(shares, **here) if shares else b""
        exact = Framed(self._rounded(self.adapter + change), residual)
        if data and len(data) < self.record.adapter_bytes:
            exact = Framed(exact.adapter, residual, Frame(round, MESSAGES, len(data)), data)
        if settings.keyframe is None:
            return exact
        part = self.spec.trained_part(self.schema)
        size = parse_budget(settings.keyframe, part.schema.num_params)
        most = settings.longest * size
        joining = self.record.path_from(0).num_bytes
        if exact.frame is not None and joining + len(data) <= most:
            return exact
        target = self.adapter + change if residual is None else self.adapter + change + residual
        if exact.frame is None and settings.step is not None:
            step = parse_budget(settings.step, part.schema.num_params)
            if joining + step <= most:
                return self._coded(STEP, target, self.adapter, step, here)
        base = self.schema.digest(self.initial)
        return self._coded(KEYFRAME, target, self.initial, size * (1 + last), here | {"base": base})

    def _coded(self, kind: str, target: Tensor, start: Tensor, max_bytes: int, here: Mapping[str, Any]) -> Framed:
        """The frame that says how `target` differs from `start`, and what it leaves out."""
        part = self.spec.trained_part(self.schema)
        encoded = get_codec(CODEC).encode(
            part.schema.unflatten(part.take(target - start)),
            part.schema.unflatten(part.take(product_weights(self.schema, target))),
            max_bytes=max_bytes,
        )
        data = pack_coded(kind, encoded.payload, **here)
        adapter = self._rounded(start + part.put(encoded.reconstruction.to_dense()))
        return Framed(adapter, target - adapter, Frame(here["round"], kind, len(data)), data)

    def _rounded(self, adapter: Tensor) -> Tensor:
        """As the published file has it."""
        return self.schema.flatten(self.schema.unflatten(adapter))


def residual_fields(files: Mapping[str, bytes]) -> dict[str, Any]:
    """What the round's record says of the residual among the files to publish."""
    data = files.get(RESIDUAL_FILE)
    return {} if data is None else {"residual_sha256": hashlib.sha256(data).hexdigest()}


def residual_file(mailbox: Mailbox, record: RoundRecord) -> bytes | None:
    """What the published adapter of a round lacks of the exact one, as a file; None for nothing.

    Raises:
        MailboxError: the file is not the one that the record names.
    """
    if record.residual_sha256 is None:
        return None
    data = mailbox.read(record.round, RESIDUAL_FILE)
    if hashlib.sha256(data).hexdigest() != record.residual_sha256:
        raise MailboxError(
            f"The {RESIDUAL_FILE} of round {record.round} is not the one that its record names: it is damaged or was "
            "edited. Restore it from a backup of the mailbox."
        )
    return data


def read_residual(mailbox: Mailbox, record: RoundRecord, num_params: int) -> Tensor | None:
    """The vector in it, (num_params,) float32. Raises as `residual_file`, and where it holds something else."""
    data = residual_file(mailbox, record)
    if data is None:
        return None
    tensors = adapter_file.load_tensors(data, f"The {RESIDUAL_FILE}", max_header=_MAX_HEADER, error=MailboxError)
    if list(tensors) != [_TENSOR] or tensors[_TENSOR].shape != (num_params,):
        raise MailboxError(f"The {RESIDUAL_FILE} of round {record.round} holds no vector of {num_params} numbers.")
    return tensors[_TENSOR]


def product_weights(schema: Schema, adapter: Tensor) -> Tensor:
    """What an error in each coordinate costs in LoRA's products B A, squared and summed; (num_params,) float32, mean 1.

    An error in row r of A is multiplied with column r of B, and the other way round: at the start, where B is nearly
    zero, most bits go to B. Coordinates of other tensors weigh 1.
    """
    state = schema.unflatten(adapter)
    weights = torch.ones(schema.num_params)
    views = schema.unflatten(weights)
    for name, a in state.items():
        partner = as_lora_b(name)
        if not is_lora_a(name) or partner not in state:
            continue
        b = state[partner]
        rank = a.shape[0]
        of_a = b.reshape(-1, rank).square().sum(0)
        of_b = a.reshape(rank, -1).square().sum(1)
        mean = (of_a.sum() * (a.numel() // rank) + of_b.sum() * (b.numel() // rank)) / (a.numel() + b.numel())
        if not 0 < float(mean) < float("inf"):
            continue
        views[name].copy_((of_a / mean).clamp(min=_LEAST_WEIGHT).reshape(-1, *[1] * (a.ndim - 1)).expand_as(a))
        views[partner].copy_((of_b / mean).clamp(min=_LEAST_WEIGHT).reshape(1, -1, *[1] * (b.ndim - 2)).expand_as(b))
    return weights
