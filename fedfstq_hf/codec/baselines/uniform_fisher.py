"""Codec `uniform-fisher`: a control that is `fstq` with every coordinate's Fisher information taken as equal.

The ablation "uniform Fisher" of arXiv 2604.25421: what is the token-coupled Fisher information worth to the message?
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..fstq import FstqCodec
from ..registry import CodecContext, Encoded, register


@register("uniform-fisher")
class UniformFisherCodec(FstqCodec):
    """`fstq`, payload and options included, but blind to the Fisher information it is given."""

    name = "uniform-fisher"

    def encode(
        self,
        delta: Mapping[str, Tensor],
        fisher: Mapping[str, Tensor] | None = None,
        *,
        max_bytes: int | None = None,
        context: CodecContext | None = None,
    ) -> Encoded:
        """As `fstq` without a Fisher. Raises BudgetError if `max_bytes` is negative."""
        return super().encode(delta, None, max_bytes=max_bytes, context=context)
