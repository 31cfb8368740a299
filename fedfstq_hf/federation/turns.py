"""Turns: in a round, one client's message covers a share of the adapter's tensors, another client's another share.

The clients of a round say much the same: their updates have most of their length in common. So a round's bytes are
better spent on a few clients' precise word on each tensor than on everybody's coarse one. Which tensors a message
covers follows from the federation's seed, the round and the client id, so it takes no bytes and nobody has to agree on
it; the server averages each tensor over those whose turn it was. (Random masks: Konecny et al. 2016,
https://arxiv.org/abs/1610.05492, section 2; of single coordinates there.)
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from fedfstq_hf.codec import Schema, SparseUpdate
from fedfstq_hf.federation.part import Part, subschema

_UNIT = 2.0**-64


class Turn(Part):
    """What of a vector a message covers: the codec sees nothing else."""

    def put_update(self, update: SparseUpdate) -> SparseUpdate:
        """A decoded message as an update of the whole vector."""
        if self.everything:
            return update
        return SparseUpdate(self.whole.num_params, None, self.put(update.to_dense()))

    def covers(self) -> Tensor:
        """Which coordinates it covers, bool (whole.num_params,)."""
        return self.put(torch.ones(self.schema.num_params, dtype=torch.bool, device="cpu"))


def turn_of(schema: Schema, coverage: float, *, seed: int, client_id: str, round: int) -> Turn:
    """The turn of a client in a round.

    Each round lays the tensors on a circle in an order of its own; a client covers the arc that begins at its own
    place. Tensors are kept whole, so that what a codec finds in them stays.

    Args:
        schema: of what travels.
        coverage: share of its tensors, above 0 and at most 1; at least one tensor, and all of them at 1.
        seed: the federation's.
    """
    count = len(schema.tensors)
    covered = min(count, max(1, math.floor(coverage * count + 0.5)))
    if covered == count:
        return Turn(schema, schema)
    order = sorted(range(count), key=lambda i: _draw(f"tensor {seed} {round} {i}"))
    start = int(_draw(f"client {seed} {round} {client_id}") * count)
    names = {schema.tensors[order[(start + i) % count]].name for i in range(covered)}
    return Turn(schema, subschema(spec for spec in schema.tensors if spec.name in names))


def _draw(text: str) -> float:
    """A number in [0, 1) that is the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") * _UNIT
