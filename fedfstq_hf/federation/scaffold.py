"""SCAFFOLD's control variates: what travels, what clients keep, what the server publishes.

Karimireddy et al. (https://arxiv.org/abs/1910.06378), algorithm 1. Client i holds c_i, the server c, both zero first.
A message carries, beside the update, the change of c_i; the server adds it: c <- c + 1/N sum_i (c_i+ - c_i), over all N
clients, so that c stays the mean of all c_i. As in the paper all clients weigh alike, also in the mean update.

A client takes its change over when a record names its message, and then by what the codec made of it: server and
client agree about every c_i, and what a lossy codec leaves out is part of the next change. After a rollback all begin
anew with zeros: what clients held in an earlier round nobody knows any more.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fedfstq_hf.codec import SparseUpdate
from fedfstq_hf.errors import MailboxError
from fedfstq_hf.federation.aggregation import clip_scale, longest_norm
from fedfstq_hf.federation.mailbox.protocol import VARIATE_FILE, Mailbox
from fedfstq_hf.federation.record import RoundRecord
from fedfstq_hf.federation.spec import FederationSpec

CARRIED = "scaffold.variate"
"""Key of c_i, (num_params,) float32, among what a session carries."""
_TENSOR = "control_variate"
_MAX_HEADER = 1000


def client_variate(carried: Mapping[str, Tensor], num_params: int) -> Tensor:
    """c_i, (num_params,) float32: zeros for a client of which no change was accepted yet."""
    return carried[CARRIED] if CARRIED in carried else torch.zeros(num_params)


def read_variate(mailbox: Mailbox, record: RoundRecord, spec: FederationSpec, num_params: int) -> Tensor | None:
    """c of a published round, (num_params,) float32; None where the federation has no control variates.

    Raises:
        MailboxError: the file is not the one that the record names.
    """
    if not spec.method.scaffold:
        return None
    if record.variate_sha256 is None:  # before the first aggregation, or after a rollback
        return torch.zeros(num_params)
    data = mailbox.read(record.round, VARIATE_FILE, max_bytes=4 * num_params + _MAX_HEADER)
    try:
        if hashlib.sha256(data).hexdigest() != record.variate_sha256:
            raise ValueError("its sha256 is not the one that the round's record names")
        variate = load(data)[_TENSOR]
        if variate.shape != (num_params,):
            raise ValueError(f"it has shape {tuple(variate.shape)}, expected ({num_params},)")
    except (SafetensorError, KeyError, ValueError) as error:
        raise MailboxError(f"The {VARIATE_FILE} of round {record.round} cannot be read: {error}") from error
    return variate


def next_variate(
    mailbox: Mailbox, record: RoundRecord, spec: FederationSpec, num_params: int, changes: Tensor | None
) -> dict[str, bytes]:
    """What to publish after the round of `record`: file name -> content; nothing without control variates.

    Args:
        changes: the sum of the accepted changes, (num_params,) float64; None where there were none.
    """
    variate = read_variate(mailbox, record, spec, num_params)
    if variate is None or spec.num_clients is None:
        return {}
    if changes is not None:
        variate = (variate.double() + changes / spec.num_clients).float()
    return {VARIATE_FILE: save({_TENSOR: variate})}


def record_fields(files: Mapping[str, bytes]) -> dict[str, Any]:
    """What the round's record says of the file among those to publish."""
    data = files.get(VARIATE_FILE)
    if data is None:
        return {}
    return {"variate_sha256": hashlib.sha256(data).hexdigest(), "variate_bytes": len(data)}


class VariateChanges:
    """The sum of a round's changes, (num_params,) float64, one in memory at a time.

    Args:
        norms: of all changes that are going to be added.
        clip: a change that is longer than that many times the median is shortened to it; None for none. A single
            change among many that are zero has nothing to be compared with, and is not added.
    """

    def __init__(self, num_params: int, norms: Sequence[float], clip: float | None) -> None:
        self.sum = torch.zeros(num_params, dtype=torch.float64)
        self._longest = longest_norm(norms, clip)

    def add(self, change: SparseUpdate) -> None:
        """Add one client's change."""
        change.add_to(self.sum, clip_scale(change.norm(), self._longest))
