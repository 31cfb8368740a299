"""Codec `uniform`: every coordinate on a uniform grid whose step follows the weights, entropy-coded.

For dense values, as in an adapter that is shared whole: the others are made for sparse changes. Source: scalar
quantisation under an entropy constraint with rate-distortion optimised decisions, as in image codecs.

A *group* is a row of a tensor seen as (smaller side, larger side): in a LoRA matrix, one component of the rank. The
payload is one ANS stream (entropy.py), read in this order; values that are all zero make an empty payload.

| symbols | model | meaning |
|---|---|---|
| 1 per group | adaptive, 32 | class; 0: the group is all zeros |
| 1 per tensor | adaptive, 2 | steps are predicted by 0: the group before, 1: the tensor before (of as many groups) |
| 1 | uniform, 16 | by how many 64ths of an octave all steps are raised |
| 1 per group not 0 | adaptive, 512 | step, on a grid of 4 per octave from 2^-80, minus its prediction, modulo 512 |
| 1 per class in use | adaptive, 256 | its largest magnitude m, less 1 |
| m + 1 per class in use | adaptive, 48 | weights of the magnitudes 0 .. m: 2^(-i/2) |
| 3 per class in use | uniform, 32 | where magnitudes 1, 2 and above are read, in 32nds of a step above m - 1/2 |
| 1 per coordinate of a group not 0 | its class's weights, signs equally likely | signed magnitude + m |
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..registry import CodecContext, Encoded, register
from ..schema import Schema
from ..update import SparseUpdate
from .grid import assemble, read, shape_of
from .rounding import fit


@register("uniform")
class UniformCodec:
    """Entropy-coded uniform quantisation, finer where `fisher` weighs more; 4 bits a value without `max_bytes`."""

    name = "uniform"
    unbiased = False

    def encode(
        self,
        delta: Mapping[str, Tensor],
        fisher: Mapping[str, Tensor] | None = None,
        *,
        max_bytes: int | None = None,
        context: CodecContext | None = None,
    ) -> Encoded:
        """Spend the budget on the least weighted squared error. Raises BudgetError if not even zeros fit."""
        return fit(delta, fisher, max_bytes).encoded

    def decode(self, payload: bytes, schema: Schema, context: CodecContext | None = None) -> SparseUpdate:
        """The adapter. Raises MessageError on any malformed payload."""
        sides = [shape_of(spec) for spec in schema.tensors]
        if not payload:
            return SparseUpdate(schema.num_params, None, torch.zeros(schema.num_params, device="cpu"))
        return assemble(schema, read(payload, sides))
