"""Refinements: a round waits for short previews only, and what they left out arrives while the next round trains.

Uplinks are idle while clients train. So a client says its update twice: in a *preview* that the round waits for, and in
a *refinement*, the whole update at more bits, which is sent from then on. Each round's step is what its previews say,
taken in part, and what the round before is now known to have been (METHOD section 1, step 4, in two parts):

    Theta_{t+1} = ServerOptimizer(Theta_t, -(s P_t + R_{t-1} - s P_{t-1}))

P_t is the weighted mean of round t's previews, R_t the same of its refinements (of previews where none arrived), s the
spec's `preview_step`. With s = 1 all of a preview's noise is there when the next round trains; with less, less of it,
and more of the update comes a round late. The last round has neither: its messages are as long as refinements.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedfstq_hf.codec import SparseUpdate
from fedfstq_hf.errors import MessageError
from fedfstq_hf.federation.aggregation import WeightedMean
from fedfstq_hf.federation.collecting import Collected, Collector
from fedfstq_hf.federation.mailbox import Mailbox, UpdateRef
from fedfstq_hf.federation.record import AcceptedUpdate, RefusedUpdate, RoundRecord
from fedfstq_hf.federation.screening import Screening

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Refined:
    """What refinements change about the last round.

    `change` is R_{t-1} - s P_{t-1}, (num_params,) float32.
    """

    change: Tensor
    used: tuple[AcceptedUpdate, ...] = ()
    refused: tuple[RefusedUpdate, ...] = ()


class Refiner:
    """Refines the round that a record closed.

    Args:
        base: round -> sha256 of the adapter that its updates start from.
        selected: round -> clients whose updates of it are wanted, None for all.
    """

    def __init__(
        self,
        mailbox: Mailbox,
        *,
        num_params: int,
        base: Callable[[int], str],
        selected: Callable[[int], tuple[str, ...] | None],
    ) -> None:
        self._mailbox = mailbox
        self._num_params = num_params
        self._base = base
        self._selected = selected

    def refine(
        self,
        record: RoundRecord,
        previews: Mapping[str, UpdateRef],
        refinements: Mapping[str, UpdateRef],
        screening: Screening,
    ) -> Refined:
        """Read both messages of every client of the round that `record` closed.

        Args:
            record: names the previews that were used, and their weights.
            previews: of that round, by client.
            refinements: likewise.
        """
        said, lost = self._previews(record, previews, screening)
        used = {entry.client_id: previews[entry.client_id] for entry in record.accepted if entry.client_id not in lost}
        wanted = {client: ref for client, ref in refinements.items() if client not in lost}
        collected, refused = self._collect(record.round - 1, used, wanted, screening)
        unused = {update.client_id for update in refused}
        refined = (entry for entry in collected.accepted if entry.client_id in wanted)
        mean = collected.mean.result() if collected.accepted else torch.zeros(self._num_params)
        return Refined(
            mean - screening.spec.preview_step * said,
            tuple(entry for entry in refined if entry.client_id not in unused),
            refused,
        )

    def _collect(
        self, round: int, used: Mapping[str, UpdateRef], refinements: Mapping[str, UpdateRef], screening: Screening
    ) -> tuple[Collected, tuple[RefusedUpdate, ...]]:
        """The mean of the refinements, and of previews where there is none or it is refused."""
        collector = Collector(
            self._mailbox, round, num_params=self._num_params, base=self._base, selected=self._selected
        )
        collected = collector.collect(sorted({**used, **refinements}.values()), screening)
        refused = tuple(dataclasses.replace(update, round=round) for update in collected.refused if update.refinement)
        if refused:
            unused = {update.client_id for update in refused}
            good = {client: ref for client, ref in refinements.items() if client not in unused}
            collected = collector.collect(sorted({**used, **good}.values()), screening)
        return collected, refused

    def _previews(
        self, record: RoundRecord, previews: Mapping[str, UpdateRef], screening: Screening
    ) -> tuple[Tensor, set[str]]:
        """What those previews said in the mean that can be read again, and the clients whose preview cannot.

        Theirs stays as it was: what cannot be taken back must not be said twice.
        """
        mean, lost = WeightedMean(self._num_params), set()
        for entry in record.accepted:
            try:
                mean.add(self._opened(entry, previews.get(entry.client_id), screening), entry.weight, entry.scale)
            except MessageError as error:
                logger.warning(
                    "The refinement of client %s for round %d is not used: %s",
                    entry.client_id,
                    record.round - 1,
                    error,
                )
                lost.add(entry.client_id)
        said = mean.total_weight * mean.result() if mean.total_weight else torch.zeros(self._num_params)
        return said, lost

    def _opened(self, entry: AcceptedUpdate, ref: UpdateRef | None, screening: Screening) -> SparseUpdate:
        if ref is None:
            raise MessageError("Its preview is no longer in the mailbox.")
        data = self._mailbox.read_update(ref, max_bytes=screening.max_bytes)
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise MessageError("Its preview is not the one that was used.")
        return screening.open(ref, data, self._base(ref.round)).update
