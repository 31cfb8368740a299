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

from fedfstq_hf.errors import MailboxError, MessageError
from fedfstq_hf.federation.aggregation import WeightedMean
from fedfstq_hf.federation.control import Control
from fedfstq_hf.federation.mailbox import Mailbox, UpdateRef
from fedfstq_hf.federation.record import AcceptedUpdate, RefusedUpdate
from fedfstq_hf.federation.screening import Screening

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Collected:
    """The updates of a round that were accepted, with their mean, and those that were refused or late."""

    mean: WeightedMean
    accepted: tuple[AcceptedUpdate, ...]
    refused: tuple[RefusedUpdate, ...]
    late: tuple[RefusedUpdate, ...] = ()


class Collector:
    """Collects the updates of one open round. It remembers what it refused, so that waiting is quiet.

    Args:
        round: the open round.
        base: round -> sha256 of the adapter that its updates start from.
        selected: round -> clients whose updates of it are wanted, None for all.
    """

    def __init__(
        self,
        mailbox: Mailbox,
        round: int,
        *,
        num_params: int,
        base: Callable[[int], str],
        selected: Callable[[int], tuple[str, ...] | None],
    ) -> None:
        self.round = round
        self._mailbox = mailbox
        self._num_params = num_params
        self._base = base
        self._selected = selected
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
        screened = [self._screen(ref, screening) for ref in refs if ref not in self._refused]
        found = [(ref, entry) for ref, entry in screened if entry is not None]
        accepted = self._weighed([entry for _, entry in found], screening)
        mean = WeightedMean(self._num_params)
        for (ref, _), entry in zip(found, accepted, strict=True):
            data = self._mailbox.read_update(ref, max_bytes=screening.max_bytes)
            if hashlib.sha256(data).hexdigest() != entry.sha256:
                raise MailboxError(
                    f"The message of client {ref.client_id} for round {ref.round} changed while it was being read. "
                    "Nothing was published; start the coordinator again."
                )
            mean.add(screening.open(ref, data, self._base(ref.round)).update, entry.weight, entry.scale)
        total = mean.total_weight or 1.0
        return Collected(
            mean,
            tuple(dataclasses.replace(entry, weight=entry.weight / total) for entry in accepted),
            tuple(self._refused[ref] for ref in refs if ref in self._refused),
        )

    def _screen(self, ref: UpdateRef, screening: Screening) -> tuple[UpdateRef, AcceptedUpdate | None]:
        sha256 = ref.sha256
        try:
            screening.check_sender(ref, self._selected(ref.round))
            data = self._mailbox.read_update(ref, max_bytes=screening.max_bytes)
            sha256 = hashlib.sha256(data).hexdigest()
            opened = screening.open(ref, data, self._base(ref.round))
        except MessageError as error:
            logger.warning("Refused the update of client %s for round %d: %s", ref.client_id, ref.round, error)
            other = ref.round if ref.round != self.round else None
            self._refused[ref] = RefusedUpdate(ref.client_id, sha256, ref.num_bytes, str(error), other)
            return ref, None
        return ref, AcceptedUpdate(
            client_id=ref.client_id,
            sha256=sha256,
            num_bytes=ref.num_bytes,
            num_examples=opened.header.num_examples,
            weight=0.0,
            norm=opened.norm,
            staleness=self.round - ref.round,
            signed=opened.signed,
        )

    def _weighed(self, entries: Sequence[AcceptedUpdate], screening: Screening) -> list[AcceptedUpdate]:
        """The entries with their unnormalised weights and their scale."""
        if not entries:
            return []
        spec = screening.spec
        examples = [float(entry.num_examples) for entry in entries]
        most = spec.weight_cap * statistics.median_low(examples) if spec.weight_cap is not None else max(examples)
        middle = statistics.median_low(entry.norm for entry in entries)
        longest = spec.clip * middle if spec.clip is not None and middle > 0 else None
        weighed = []
        for entry, count in zip(entries, examples, strict=True):
            own = screening.control.enrolment(entry.client_id).max_examples
            weight = min(count, most, own if own is not None else count)
            scale = 1.0 if longest is None or entry.norm <= longest else longest / entry.norm
            weight *= spec.staleness_discount**entry.staleness
            weighed.append(dataclasses.replace(entry, weight=weight, scale=scale))
        return weighed
