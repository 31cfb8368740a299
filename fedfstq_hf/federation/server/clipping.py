"""How long an update may be: one client's influence on a round is bounded, also where most messages say nothing.

The bound is a multiple of the round's median length. Empty messages are ordinary (a slow link, a tiny budget), and
where most are empty the median is 0 and says nothing about the others. Then the lengths of those that say something
count, together with what the round before used; as even these may be few, no update may be longer than the adapter.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from fedfstq_hf.codec import SparseUpdate
from fedfstq_hf.federation.record import RoundRecord


@dataclass(frozen=True)
class Usual:
    """What lengths are compared with where most messages of a round say nothing.

    Attributes:
        lengths: L2 norms that the round before used, as they were clipped.
        adapter: L2 norm of the adapter; 0 for none to compare with.
    """

    lengths: tuple[float, ...] = ()
    adapter: float = 0.0

    @classmethod
    def of(cls, record: RoundRecord, adapter: Tensor) -> Usual:
        """From the record that opened the round, and a published adapter, (num_params,) float32."""
        lengths = tuple(update.scale * update.norm for update in record.accepted)
        return cls(lengths, SparseUpdate(adapter.numel(), None, adapter).norm())


def longest(norms: Sequence[float], clip: float | None, usual: Callable[[], Usual] = Usual) -> float:
    """The L2 norm above which an update is scaled down to it; infinite for no bound.

    Args:
        norms: of the round's updates, at least 0.
        clip: the spec's; None clips nothing.
        usual: asked only where most of the norms are 0.

    Returns:
        `clip` times the lower median of the norms. Where that is 0: `clip` times the lower median of those above 0 and
        of the usual ones, and no more than the adapter's norm. 0 where a single update says anything and there is
        nothing at all to compare it with.
    """
    if clip is None or not any(norms):
        return math.inf
    middle = statistics.median_low(norms)
    if middle > 0:
        return clip * middle
    known = usual()
    lengths = [norm for norm in (*norms, *known.lengths) if norm > 0]
    if known.adapter > 0:
        return min(clip * statistics.median_low(lengths), known.adapter)
    return clip * statistics.median_low(lengths) if len(lengths) > 1 else 0.0


def scale(norm: float, longest: float) -> float:
    """What an update of that norm is multiplied with."""
    return 1.0 if norm <= longest else longest / norm
