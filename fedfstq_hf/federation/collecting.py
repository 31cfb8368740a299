"""Collecting a round: every message screened, weighed and clipped, then averaged.

Messages are read twice, because caps and clipping refer to the round's medians: once to screen and measure them, once
to add them up. So one update is in memory at a time, however many clients there are.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from fedfstq_hf.errors import MailboxError, MessageError
from fedfstq_hf.federation import clipping
from fedfstq_hf.federation.aggregation import WeightedMean
from fedfstq_hf.federation.control import Control
from fedfstq_hf.federation.mailbox import Mailbox, UpdateRef
from fedfstq_hf.federation.record import AcceptedUpdate, RefusedUpdate
from fedfstq_hf.federation.scaffold import VariateChanges
from fedfstq_hf.federation.screening import OpenedUpdate, Screening
from fedfstq_hf.federation.weights import precision_weights

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Collected:
    """The updates of a round that were accepted, with their mean, and those that were refused or late.

    `variates` is the sum of the changes of control variates, (num_params,) float64, where the federation has them.
    """

    mean: WeightedMean
    accepted: tuple[AcceptedUpdate, ...]
    refused: tuple[RefusedUpdate, ...]
    late: tuple[RefusedUpdate, ...] = ()
    variates: Tensor | None = None


class Collector:
    """Collects the updates of one round. It remembers what it refused, so that waiting is quiet.

    Args:
        round: the open round, or the one that is refined.
        num_params: of what travels.
        base: round -> sha256 of the adapter that its updates start from.
        selected: round -> clients whose updates of it are wanted, None for all.
        usual: the lengths that updates are compared with where most of the round say nothing.
    """

    def __init__(
        self,
        mailbox: Mailbox,
        round: int,
        *,
        num_params: int,
        base: Callable[[int], str],
        selected: Callable[[int], tuple[str, ...] | None],
        usual: Callable[[], clipping.Usual] = clipping.Usual,
    ) -> None:
        self.round = round
        self._mailbox = mailbox
        self.num_params = num_params
        self._base = base
        self._selected = selected
        self._usual = usual
        self._refused: dict[UpdateRef, RefusedUpdate] = {}
        self._refused_by = Control()

    def refused(self, ref: UpdateRef, control: Control) -> bool:
        """Whether this very message was refused before, when the same clients were enrolled."""
        return control.clients == self._refused_by.clients and ref in self._refused

    def collect(self, refs: Sequence[UpdateRef], screening: Screening) -> Collected:
        """Screen, weigh and average the messages, in the order given."""
        if screening.control.clients != self._refused_by.clients:
            self._refused.clear()
        self._refused_by = screening.control
        screened = [(ref, self._screen(ref, screening)) for ref in refs if ref not in self._refused]
        found = [(ref, *result) for ref, result in screened if result is not None]
        accepted = self._weighed([entry for _, entry, _ in found], screening)
        mean = WeightedMean(self.num_params, parts=screening.spec.coverage < 1)
        lengths = [length for *_, length in found if length is not None]
        variates = VariateChanges(self.num_params, lengths, screening.spec.clip) if lengths else None
        for (ref, *_), entry in zip(found, accepted, strict=True):
            opened = self.reopen(ref, entry.sha256, screening)
            if opened is None:
                raise MailboxError(
                    f"The message of client {ref.client_id} for round {ref.round} changed while it was being read. "
                    "Nothing was published; start the coordinator again."
                )
            mean.add(opened.update, entry.weight, entry.scale, opened.covers)
            if variates is not None and opened.variate is not None:
                variates.add(opened.variate)
        total = mean.total_weight or 1.0
        return Collected(
            mean,
            tuple(dataclasses.replace(entry, weight=entry.weight / total) for entry in accepted),
            tuple(self._refused[ref] for ref in refs if ref in self._refused),
            variates=None if variates is None else variates.sum,
        )

    def reopen(self, ref: UpdateRef, sha256: str, screening: Screening) -> OpenedUpdate | None:
        """A message that was read before; None if it is not the same any more.

        Raises:
            MessageError: it would be refused now.
        """
        data = self._mailbox.read_update(ref, max_bytes=screening.max_bytes)
        if hashlib.sha256(data).hexdigest() != sha256:
            return None
        return screening.open(ref, data, self._base(ref.round))

    def _screen(self, ref: UpdateRef, screening: Screening) -> tuple[AcceptedUpdate, float | None] | None:
        """The entry of a message, and the norm of its change of a control variate; None where it was refused."""
        sha256 = ref.sha256
        try:
            screening.check_sender(ref, self._selected(ref.round))
            data = self._mailbox.read_update(ref, max_bytes=screening.max_bytes)
            sha256 = hashlib.sha256(data).hexdigest()
            opened = screening.open(ref, data, self._base(ref.round))
        except MessageError as error:
            logger.warning("Refused the update of client %s for round %d: %s", ref.client_id, ref.round, error)
            other = ref.round if ref.round != self.round else None
            refused = RefusedUpdate(ref.client_id, sha256, ref.num_bytes, str(error), other, ref.refinement)
            self._refused[ref] = refused
            return None
        entry = AcceptedUpdate(
            client_id=ref.client_id,
            sha256=sha256,
            num_bytes=ref.num_bytes,
            num_examples=opened.header.num_examples,
            weight=0.0,
            norm=opened.norm,
            staleness=self.round - ref.round,
            signed=opened.signed,
        )
        return entry, None if opened.variate is None else opened.variate.norm()

    def _weighed(self, entries: Sequence[AcceptedUpdate], screening: Screening) -> list[AcceptedUpdate]:
        """The entries with their unnormalised weights and their scale."""
        if not entries:
            return []
        spec = screening.spec
        # SCAFFOLD as in its paper: the control variate is the mean over clients
        basis = "uniform" if spec.scaffold_clients is not None else spec.weights
        raw = [{"bytes": entry.num_bytes, "uniform": 1}.get(basis, entry.num_examples) for entry in entries]
        most = spec.weight_cap * statistics.median_low(raw) if spec.weight_cap is not None else max(raw)
        longest = clipping.longest([entry.norm for entry in entries], spec.clip, self._usual)
        weights = []
        for entry, value in zip(entries, raw, strict=True):
            own = screening.control.enrolment(entry.client_id).max_examples
            # who counts as fewer examples than it says weighs less in the same proportion, also by its bytes
            trusted = 1.0 if own is None or basis == "uniform" else min(1.0, own / max(1, entry.num_examples))
            weights.append(min(value * trusted, most))
        if basis == "precision":
            weights = precision_weights(weights, [entry.norm for entry in entries])
        weighed = []
        for entry, weight in zip(entries, weights, strict=True):
            weight *= spec.staleness_discount**entry.staleness
            weighed.append(dataclasses.replace(entry, weight=weight, scale=clipping.scale(entry.norm, longest)))
        return weighed
