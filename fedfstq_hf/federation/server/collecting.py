"""Collecting a round: every message screened, weighed and clipped, then averaged.

Messages are read twice, because caps and clipping refer to the round's medians: once to screen and measure them, once
to add them up. So one update is in memory at a time, however many clients there are.

What messages of unequal noise weigh in a round's mean.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
import statistics
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass

from torch import Tensor

from fedfstq_hf.errors import ConfigError, MailboxError, MailboxUnavailableError, MessageError
from fedfstq_hf.federation.aggregation import UsualNorm, WeightedMean, clip_scale, longest_norm
from fedfstq_hf.federation.control import Control
from fedfstq_hf.federation.frames import Share
from fedfstq_hf.federation.mailbox.protocol import Mailbox, UpdateRef
from fedfstq_hf.federation.record import MAX_REASON, AcceptedUpdate, RefusedUpdate
from fedfstq_hf.federation.scaffold import VariateChanges
from fedfstq_hf.federation.server.screening import OpenedUpdate, Screening
from fedfstq_hf.text import printable, printable_traceback

logger = logging.getLogger(__name__)

_MOST_TRIES = 3
_MAX_NORM = 1e12
"""Far above any update, and far enough below what float32 holds: squared, too, it is finite."""

_Key = tuple[str, int, bool]


@dataclass(frozen=True)
class Collected:
    """The updates of a round that were accepted, with their mean, and those that were refused or late.

    `variates` is the sum of the changes of control variates, (num_params,) float64, where the federation has them.
    `shares` are what `mean` was made of, in order; empty where they weigh more than the plain adapter.
    """

    mean: WeightedMean
    accepted: tuple[AcceptedUpdate, ...]
    refused: tuple[RefusedUpdate, ...]
    late: tuple[RefusedUpdate, ...] = ()
    variates: Tensor | None = None
    shares: tuple[Share, ...] = ()


@dataclass(frozen=True)
class _Opened:
    """What is remembered of a message between its two readings; `variate` is the norm of that change, if there is one.

    `entry` has no weight yet.
    """

    entry: AcceptedUpdate
    variate: float | None


@dataclass
class _Refusal:
    """What is remembered of a client's refused messages for one round."""

    stamp: str
    update: RefusedUpdate
    tries: int


class Collector:
    """Collects the updates of one round. It remembers what it refused, so that waiting is quiet.

    One client costs a round little: `_MOST_TRIES` of its messages are looked at, and one that is another one when it is
    read again was its last.

    Args:
        round: the open round, or the one that is refined.
        num_params: of what travels.
        base: round -> digest of the adapter that its updates start from.
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
        usual: Callable[[], UsualNorm] = UsualNorm,
    ) -> None:
        self.round = round
        self._mailbox = mailbox
        self.num_params = num_params
        self._base = base
        self._selected = selected
        self._usual = usual
        self._refused: dict[_Key, _Refusal] = {}
        self._refused_by = Control()

    def open(self, refs: Sequence[UpdateRef], control: Control) -> list[UpdateRef]:
        """Those that were not refused before, when the same clients were enrolled."""
        if control.clients != self._refused_by.clients:
            return list(refs)
        return [ref for ref in refs if not self._is_refused(ref)]

    def collect(self, refs: Sequence[UpdateRef], screening: Screening) -> Collected:
        """Screen, weigh and average the messages, in the order given.

        A message that changes, or goes, between its two readings is refused, and the others are weighed without it.
        """
        if screening.control.clients != self._refused_by.clients:
            self._refused.clear()
        self._refused_by = screening.control
        selected = {round: _as_set(self._selected(round)) for round in {ref.round for ref in refs}}
        found: dict[UpdateRef, _Opened] = {}
        for ref in refs:
            opened = None if self._is_refused(ref) else self._screen(ref, selected[ref.round], screening)
            if opened is not None:
                found[ref] = opened
        while True:  # each time over again, at least one client takes part in this round no more
            collected, changed = self._add_up(found, screening)
            if not changed:
                break
            for ref, reason in changed.items():
                self._refuse(ref, found.pop(ref).entry.sha256, reason, tries=_MOST_TRIES)
        refused = (self._refused[_key(ref)].update for ref in refs if self._is_refused(ref))
        return dataclasses.replace(collected, refused=tuple(refused))

    def _add_up(
        self, found: Mapping[UpdateRef, _Opened], screening: Screening
    ) -> tuple[Collected, dict[UpdateRef, str]]:
        """The mean of the messages; and those that are not what they were, with the reason: then it is no mean."""
        accepted = self._weighed([opened.entry for opened in found.values()], screening)
        mean = WeightedMean(self.num_params)
        lengths = [opened.variate for opened in found.values() if opened.variate is not None]
        variates = VariateChanges(self.num_params, lengths, screening.spec.method.clip) if lengths else None
        changed: dict[UpdateRef, str] = {}
        shares: list[Share] = []
        room = 4 * self.num_params  # what is no shorter than the plain adapter is of no use to anybody
        for ref, entry in zip(found, accepted, strict=True):
            try:
                opened = self.reopen(ref, entry.sha256, screening)
            except MessageError as error:
                changed[ref] = f"It could not be read a second time: {error}"
                continue
            if opened is None:
                changed[ref] = "It changed while it was being read."
            elif not changed:
                mean.add(opened.update, entry.weight, entry.scale)
                room -= len(opened.payload)
                if room > 0:
                    shares.append(Share(ref.round, entry.weight, entry.scale, opened.payload))
                if variates is not None and opened.variate is not None:
                    variates.add(opened.variate)
        total = mean.total_weight or 1.0
        return (
            Collected(
                mean,
                tuple(dataclasses.replace(entry, weight=entry.weight / total) for entry in accepted),
                (),
                variates=None if variates is None else variates.sum,
                shares=tuple(shares) if room > 0 else (),
            ),
            changed,
        )

    def reopen(self, ref: UpdateRef, sha256: str, screening: Screening) -> OpenedUpdate | None:
        """A message that was read before; None if it is not the same any more.

        Raises:
            MessageError: it can no longer be read, or would be refused now.
        """
        data = self._read(ref, screening)
        if hashlib.sha256(data).hexdigest() != sha256:
            return None
        return screening.open(ref, data, self._base(ref.round))

    def _read(self, ref: UpdateRef, screening: Screening) -> bytes:
        try:
            return self._mailbox.read_update(ref, max_bytes=screening.max_bytes)
        except MailboxUnavailableError:
            raise
        except MailboxError as error:  # of this one message: the others are read all the same
            raise MessageError(str(error)) from error

    def _is_refused(self, ref: UpdateRef) -> bool:
        known = self._refused.get(_key(ref))
        return known is not None and (known.tries >= _MOST_TRIES or known.stamp == _stamp(ref))

    def _refuse(self, ref: UpdateRef, sha256: str, reason: object, *, tries: int = 1) -> None:
        reason = printable(reason, MAX_REASON)
        logger.warning("Refused the update of client %s for round %d: %s", ref.client_id, ref.round, reason)
        known = self._refused.get(_key(ref))
        tries += 0 if known is None else known.tries
        if tries >= _MOST_TRIES:
            logger.warning("No further message of client %s for round %d is looked at.", ref.client_id, ref.round)
        other = ref.round if ref.round != self.round else None
        update = RefusedUpdate(ref.client_id, sha256, ref.num_bytes, reason, other, ref.refinement)
        self._refused[_key(ref)] = _Refusal(_stamp(ref), update, tries)

    def _screen(self, ref: UpdateRef, selected: Set[str] | None, screening: Screening) -> _Opened | None:
        """What a message is; None where it was refused."""
        sha256, base = ref.sha256, self._base(ref.round)
        try:
            screening.check_sender(ref, selected)
            data = self._read(ref, screening)
            sha256 = hashlib.sha256(data).hexdigest()
            opened = screening.open(ref, data, base)
            variate = None if opened.variate is None else opened.variate.norm()
            if max(opened.norm, variate or 0.0) > _MAX_NORM:
                raise MessageError(f"Its norm is {opened.norm:.3g}; no update is longer than {_MAX_NORM:g}.")
        except MessageError as error:
            self._refuse(ref, sha256, error)
            return None
        except (ConfigError, MailboxError):
            raise  # of this coordinator
        except Exception as error:  # a fault of ours that one client found must not stop the others
            logger.warning("A message could not be opened:\n%s", printable_traceback(error))
            self._refuse(ref, sha256, f"It could not be opened: {type(error).__name__}.")
            return None
        entry = AcceptedUpdate(
            client_id=ref.client_id,
            sha256=sha256,
            num_bytes=len(data),
            num_examples=opened.header.num_examples,
            weight=0.0,
            norm=opened.norm,
            staleness=self.round - ref.round,
            signed=opened.signed,
        )
        if (known := self._refused.get(_key(ref))) is not None:
            known.stamp = ""  # the newer message takes the place of the refused one
        return _Opened(entry, variate)

    def _weighed(self, entries: Sequence[AcceptedUpdate], screening: Screening) -> list[AcceptedUpdate]:
        """The entries with their unnormalised weights and their scale."""
        if not entries:
            return []
        method = screening.spec.method
        # SCAFFOLD as in its paper: the control variate is the mean over clients
        basis = "uniform" if method.scaffold else method.weights
        raw = [1 if basis == "uniform" else entry.num_examples for entry in entries]
        most = method.weight_cap * statistics.median_low(raw) if method.weight_cap is not None else max(raw)
        longest = longest_norm([entry.norm for entry in entries], method.clip, self._usual)
        weights = []
        for entry, value in zip(entries, raw, strict=True):
            own = screening.control.enrolment(entry.client_id).max_examples
            trusted = 1.0 if own is None or basis == "uniform" else min(1.0, own / max(1, entry.num_examples))
            weights.append(min(value * trusted, most))
        if basis == "precision":
            weights = precision_weights(weights, [entry.norm for entry in entries])
        weighed = []
        for entry, weight in zip(entries, weights, strict=True):
            weight *= method.staleness_discount**entry.staleness
            weighed.append(dataclasses.replace(entry, weight=weight, scale=clip_scale(entry.norm, longest)))
        return weighed


def _key(ref: UpdateRef) -> _Key:
    return ref.client_id, ref.round, ref.refinement


def _stamp(ref: UpdateRef) -> str:
    """The same for the same message, as far as can be told unread."""
    return f"{ref.num_bytes} {ref.sha256 or ref.location}"


def _as_set(clients: Sequence[str] | None) -> Set[str] | None:
    return None if clients is None else frozenset(clients)


def precision_weights(shares: Sequence[float], norms: Sequence[float]) -> list[float]:
    """Weights near `shares` that give a noisy message less; they sum to 1.

    An unbiased codec (`fstq`) sends a client's update right on average, and a short message of it is
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
