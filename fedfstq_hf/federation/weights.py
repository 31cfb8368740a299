"""What messages of unequal noise weigh in a round's mean."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def precision_weights(shares: Sequence[float], norms: Sequence[float]) -> list[float]:
    """Weights near `shares` that give a noisy message less; they sum to 1.

    An unbiased codec (`sampled`, `trellis`) sends a client's update right on average, and a short message of it is
    mostly noise, so its squared norm says how much noise there is. With q_k that square as a multiple of the
    round's median, the weights are those that minimise

        sum_k w_k^2 q_k + sum_k (w_k - p_k)^2    with    sum_k w_k = 1:    w_k = (p_k + c) / (1 + q_k).

    The first sum is the noise of the mean. The second is what the mean of nearly orthogonal updates is off by when
    they do not have FedAvg's weights p_k. That they count alike at the median is a choice
    (docs/experiments.md). A message of norm 0 says nothing and weighs nothing.

    Args:
        shares: what each update would weigh by its number of examples; any scale.
        norms: of the decoded updates, at least 0.
    """
    said = [norm for norm in norms if norm > 0]
    if not said:
        return [share / math.fsum(shares) for share in shares]
    total = math.fsum(share for share, norm in zip(shares, norms, strict=True) if norm > 0)
    typical = statistics.median_low(said)
    trust = [1 / (1 + (norm / typical) ** 2) if norm > 0 else 0.0 for norm in norms]
    left = 1 - math.fsum(share / total * factor for share, factor in zip(shares, trust, strict=True))
    common = left / math.fsum(trust)
    return [(share / total + common) * factor for share, factor in zip(shares, trust, strict=True)]
