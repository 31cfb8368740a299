"""Refinements: a round waits for short previews only, and what they left out arrives while the next round trains.

Uplinks are idle while clients train. So a client says its update twice: in a *preview* that the round waits for, and in
a *refinement*, the whole update at more bits, which is sent from then on. Each round's step is what its previews say,
taken in part, and what the round before is now known to have been (METHOD section 1, step 4, in two parts):

    Theta_{t+1} = ServerOptimizer(Theta_t, -(s P_t + (1 - s) R_{t-1} + c s (R_{t-1} - P_{t-1})))

P_t is the weighted mean of round t's previews, R_t the same of its refinements (of previews where none arrived), s the
spec's `preview_step`. With s = 1 all of a preview's noise is there when the next round trains; with less, less of it,
and more of the update comes a round late. c is the spec's `preview_correction`: clients that start from a noisy adapter
repair part of its noise, and what they have repaired must not be taken back again. The last round has neither, nor
have those after the spec's `preview_rounds`: their messages are as long as refinements, and waited for.

A preview that was used and cannot be read again (its client was dismissed, the message is gone or another one) can be
neither taken back nor replaced. What it said stays, once. With L the weights of all such previews, they stand for s L
of the mean, and the other clients make up the rest. P_{t-1} is then the sum over those that can be read, with the
weights that were published, R_{t-1} the mean of their clients, and what is added to s P_t

    (1 - s L) R_{t-1} - s (c P_{t-1} + (1 - c) (1 - L) R_{t-1})
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedfstq_hf.errors import MessageError
from fedfstq_hf.federation.aggregation import WeightedMean
from fedfstq_hf.federation.mailbox.protocol import UpdateRef
from fedfstq_hf.federation.record import AcceptedUpdate, RefusedUpdate, RoundRecord
from fedfstq_hf.federation.server.collecting import Collector
from fedfstq_hf.federation.server.screening import OpenedUpdate, Screening

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Refined:
    """What refinements change about the last round.

    `change` is what is added to s P_t, (num_params,) float32; `used` are the refinements in R_{t-1}, with their shares.
    """

    change: Tensor
    used: tuple[AcceptedUpdate, ...] = ()
    refused: tuple[RefusedUpdate, ...] = ()


def refine(
    collector: Collector,
    record: RoundRecord,
    previews: Mapping[str, UpdateRef],
    refinements: Mapping[str, UpdateRef],
    screening: Screening,
) -> Refined:
    """Read both messages of every client of the round that `record` closed.

    Args:
        collector: of that round.
        record: names the previews that were used, and their weights.
        previews: of that round, by client.
        refinements: likewise.
    """
    said, lost = _said(collector, record, previews, screening)
    used = {entry.client_id: previews[entry.client_id] for entry in record.accepted if entry.client_id not in lost}
    good = {client: ref for client, ref in refinements.items() if client not in lost}
    collected = collector.collect(sorted({**used, **good}.values()), screening)
    refused = tuple(
        dataclasses.replace(update, round=collector.round) for update in collected.refused if update.refinement
    )
    if refused:  # the previews of these clients stand in
        for update in refused:
            del good[update.client_id]
        collected = collector.collect(sorted({**used, **good}.values()), screening)
    mean = collected.mean.result() if collected.accepted else torch.zeros(collector.num_params)
    step, taken_back = screening.spec.method.preview_step, screening.spec.method.preview_correction
    stays = sum(entry.weight for entry in record.accepted if entry.client_id in lost)
    return Refined(
        (1 - step * stays) * mean - step * (taken_back * said + (1 - taken_back) * (1 - stays) * mean),
        tuple(entry for entry in collected.accepted if entry.client_id in good),
        refused,
    )


def _said(
    collector: Collector, record: RoundRecord, previews: Mapping[str, UpdateRef], screening: Screening
) -> tuple[Tensor, set[str]]:
    """What those previews said in the mean that can be read again, and the clients whose preview cannot."""
    mean, lost = WeightedMean(collector.num_params), set()
    for entry in record.accepted:
        try:
            opened = _opened(collector, entry, previews.get(entry.client_id), screening)
        except MessageError as error:
            logger.warning(
                "The refinement of client %s for round %d is not used: %s", entry.client_id, collector.round, error
            )
            lost.add(entry.client_id)
        else:
            mean.add(opened.update, entry.weight, entry.scale)
    return mean.total_weight * mean.result() if mean.total_weight else torch.zeros(collector.num_params), lost


def _opened(collector: Collector, entry: AcceptedUpdate, ref: UpdateRef | None, screening: Screening) -> OpenedUpdate:
    if ref is None:
        raise MessageError("Its preview is no longer in the mailbox.")
    opened = collector.reopen(ref, entry.sha256, screening)
    if opened is None:
        raise MessageError("Its preview is not the one that was used.")
    return opened
