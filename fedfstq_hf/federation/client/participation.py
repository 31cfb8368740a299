"""Taking part: what a Trainer asks (`Participation`), and its answer from a real mailbox (`MailboxParticipation`)."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from fedfstq_hf.codec.budget import Budgets, MessageBudget
from fedfstq_hf.errors import BudgetError, MailboxError, no_federation
from fedfstq_hf.federation.client.downlink import Downlink
from fedfstq_hf.federation.client.outbox import Pending
from fedfstq_hf.federation.client.session import ClientSession, Settlement, says_nothing_yet
from fedfstq_hf.federation.client.uplink import PackSaliency, Uplink
from fedfstq_hf.federation.control import read_control, rules
from fedfstq_hf.federation.envelope import Records
from fedfstq_hf.federation.mailbox.posted_metrics import posted_losses, read_metrics
from fedfstq_hf.federation.mailbox.protocol import Mailbox, Polling
from fedfstq_hf.federation.record import RoundRecord, expected_messages
from fedfstq_hf.text import printable

logger = logging.getLogger(__name__)


def local_seed(seed: int, client_id: str, round: int) -> int:
    """The seed of one client's local training in one round: data order and dropout depend on nothing else."""
    digest = hashlib.sha256(f"{seed}/{client_id}/{round}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


@dataclass(frozen=True)
class Assignment:
    """One client's local training of one round.

    Attributes:
        round: the published round that training starts from.
        adapter: Θ_round, (num_params,) float32.
        adapter_sha256: of its file.
        seed: of data order and dropout.
        dataset: what to train on; None for the trainer's own `train_dataset`.
        global_step: where the trainer's step counter stands then; None leaves it alone.
        variate: the server's control variate, (num_params,) float32, where the federation has them (SCAFFOLD).
        messages: that the round is expected to have, for budgets that are a round's.
    """

    round: int
    session: ClientSession
    adapter: Tensor
    adapter_sha256: str
    seed: int
    dataset: Any = None
    global_step: int | None = None
    variate: Tensor | None = None
    messages: int = 1


@dataclass(frozen=True)
class LocalResult:
    """What local training gives back: adapter and Fisher are (num_params,) float32; loss is the mean over its steps.

    `delta` is what is sent, where it is not the difference of the adapters; `variate` the client's next control
    variate, where the federation has them. Both (num_params,) float32.
    """

    adapter: Tensor
    fisher: Tensor | None
    num_examples: int
    carried: dict[str, Tensor]
    loss: float | None = None
    delta: Tensor | None = None
    variate: Tensor | None = None


class Participation(Protocol):
    """Where a federated Trainer's work comes from and goes to."""

    total_steps: int
    """Optimizer steps until the end, for the progress bar."""

    def next(self) -> Assignment | None:
        """The next local training; blocks until there is one. None ends the training."""

    def complete(self, assignment: Assignment, result: LocalResult) -> dict[str, float]:
        """Take a finished local training; returns what to log."""

    def final_adapter(self) -> Tensor | None:
        """The global adapter after the end, (num_params,) float32."""


class MailboxParticipation:
    """One client in a real federation: waits for rounds, sends its message, settles its residual.

    Args:
        mailbox: where the federation lives.
        session: this client's state.
        budget: of its messages.
        refinements: budget of its second messages, where the federation has them.
        poll_seconds: mean time between two looks at the mailbox.
        wait_seconds: give up after waiting that long for a round; None waits for ever.
        sleep: a test passes its own.
        saliency: for a client that agrees to share its token sensitivities (see `Uplink`).

    Raises:
        BudgetError: not even an empty message fits into the budget.
    """

    def __init__(
        self,
        mailbox: Mailbox,
        session: ClientSession,
        *,
        budget: MessageBudget,
        refinements: MessageBudget | None = None,
        poll_seconds: float = 2.0,
        wait_seconds: float | None = None,
        sleep: Callable[[float], None] = time.sleep,
        saliency: PackSaliency | None = None,
    ) -> None:
        self.mailbox = mailbox
        self.session = session
        self.total_steps = rules(session.spec, read_control(mailbox)).rounds * session.spec.local_steps
        self.settlements: list[Settlement] = []
        self._budgets = Budgets(budget, refinements or MessageBudget())
        self._poll_seconds = poll_seconds
        self._wait_seconds = wait_seconds
        self._sleep = sleep
        self._seen = -1, 0.0  # the newest round, and when it was first seen
        self._undone = -1  # rollbacks up to this round are undone here
        self._record = Records(mailbox, session.spec)
        self.uplink = Uplink(mailbox, session, self._record, saliency)
        self.downlink = Downlink(mailbox, session, self._record)
        self._smallest = math.inf  # bytes of the smallest message that was checked
        self._downloaded = 0  # bytes that were logged
        self._check_share(session.spec.min_clients)

    def next(self) -> Assignment | None:
        """Wait until a round is open that this client has not trained in."""
        started, newest, announced = time.monotonic(), -1, ""
        polling = Polling(self._poll_seconds, jitter=0.5, sleep=self._sleep)
        while True:
            record = self._newest_record()
            if record.round != self._seen[0]:
                self._seen = record.round, time.monotonic()
            if record.round > newest:  # it goes on, though perhaps without this client
                started, newest = time.monotonic(), record.round
            if self._settled(record):
                self._undo(record)
                if record.finished:
                    self.uplink.background.wait()
                    return None
                if record.round > self.session.last_round and self._wanted(record):
                    spec = self.session.spec
                    messages = expected_messages(record, spec.min_clients)
                    self._check_share(messages)
                    return Assignment(
                        round=record.round,
                        session=self.session,
                        adapter=self.downlink.adapter(record),
                        adapter_sha256=record.adapter_sha256,
                        seed=local_seed(spec.seed, self.session.client_id, record.round),
                        global_step=record.round * spec.local_steps,
                        variate=self.downlink.variate(record),
                        messages=messages,
                    )
            if self._wait_seconds is not None and time.monotonic() - started > self._wait_seconds:
                raise MailboxError(
                    f"No new round in {self.mailbox.address} for {self._wait_seconds:g} s after round {record.round}. "
                    f"Is `fedfstq serve {self.mailbox.address}` running? Start this client again at any time: nothing "
                    "is lost."
                )
            paused = read_control(self.mailbox).paused
            state = f"paused: {printable(paused)}" if paused else f"waiting for round {record.round + 1}"
            if state != announced:
                logger.info("%s: %s.", self.mailbox.address, state)
                announced = state
                polling.reset()
            polling.pause()

    def complete(self, assignment: Assignment, result: LocalResult) -> dict[str, float]:
        """Store the message, then post it."""
        # anybody who can write the mailbox posts metrics: where messages need signatures, they steer nothing
        follows = self._budgets.first.controller is not None and not self.session.spec.signatures
        posted = posted_losses(read_metrics(self.mailbox, up_to=assignment.round)) if follows else ()
        owed = self.session.residual_norm()
        pending = store_message(self.session, self._budgets, assignment, result, posted)
        self.uplink.send(self._record(assignment.round))
        before, self._downloaded = self._downloaded, self.downlink.num_bytes + self._record.num_bytes
        return {
            "fed_round": assignment.round,
            "fed_uplink_bytes": self.uplink.attached_bytes
            + (0 if says_nothing_yet(pending) else len(pending.message))
            + len(pending.refinement or b""),
            "fed_downlink_bytes": self._downloaded - before,  # since the last round that this client took part in
            "fed_residual_norm": owed,  # of what earlier messages left out and this one carried on
        }

    def final_adapter(self) -> Tensor | None:
        """The newest published adapter."""
        return self.downlink.adapter(self._newest_record())

    def _check_share(self, messages: int) -> None:
        """Raise `BudgetError` unless budgets hold a message where a round has so many: better before training."""
        for name, budget in (("uplink_budget", self._budgets.first), ("refinement_budget", self._budgets.refinement)):
            least = budget.least(messages)
            if least is None or least >= self._smallest:
                continue
            try:
                self.session.check_budget(least)
            except BudgetError as error:
                if not budget.shared:
                    raise BudgetError(f"{name}: {error}") from error
                raise BudgetError(
                    f"{name}: {error}. The budget is a round's, which is expected to have {messages} messages: raise "
                    f"it by {messages} times that, or set this client's own {name} without `round:`."
                ) from error
            self._smallest = least

    def _newest_record(self) -> RoundRecord:
        head = self.mailbox.head()
        if head is None:
            raise no_federation(self.mailbox.address)
        return self._record(head)

    def _wanted(self, record: RoundRecord) -> bool:
        """Whether this client is asked for an update of the open round.

        Past its deadline a round is open because nobody whom it asked has answered: then everybody is asked.
        """
        client_id = self.session.client_id
        if not read_control(self.mailbox).enrolled(client_id):
            raise MailboxError(
                f"Client {client_id!r} is not enrolled in {self.mailbox.address}. Check client_id, or ask for "
                f"`fedfstq enrol {self.mailbox.address} {client_id}`."
            )
        if record.selected is None or client_id in record.selected:
            return True
        open_for = time.monotonic() - self._seen[1]  # since this client saw it first: clocks may differ
        return record.deadline is not None and open_for >= record.deadline - record.opened_at

    def _settled(self, newest: RoundRecord) -> bool:
        """Settle the pending message if its round is over, else post it (again); True when nothing is pending."""
        pending = self.session.pending
        if pending is None:
            return True
        if newest.round > pending.round:
            undone = newest.restored_from is not None
            if newest.round == pending.round + 1 and not undone:  # after a restart
                self.uplink.follow(pending)
            last = pending.round + 1 + self.session.spec.method.max_staleness
            records = [self._record(round) for round in range(pending.round + 1, min(newest.round, last) + 1)]
            deciding = next((record for record in records if self.session.decides(record)), None)
            if deciding is not None or newest.round >= last or newest.finished:
                self._settle(deciding or records[-1])
                return True
        self.uplink.send(newest)  # after a restart it may not have arrived; the same bytes again change nothing
        return False

    def _settle(self, record: RoundRecord) -> None:
        settlement = self.session.settle(record)
        self.settlements.append(settlement)
        if settlement.outcome in ("refused", "late"):
            logger.warning(
                "The update of round %d was %s%s; it is not sent again: the next round's training takes its place.",
                settlement.round,
                settlement.outcome,
                f": {printable(settlement.reason.removesuffix('.'))}" if settlement.reason else "",
            )

    def _undo(self, newest: RoundRecord) -> None:
        """Drop what the session holds of rounds that were rolled back, also while this client was away."""
        oldest = self.session.oldest_round
        if oldest is not None:
            for round in range(max(oldest, self._undone) + 1, newest.round + 1):
                record = self._record(round)
                if self.session.undo(record):
                    back = f"Round {round} went back to round {record.restored_from}"
                    logger.warning("%s: what this client kept of later rounds is dropped.", back)
        self._undone = newest.round


def store_message(
    session: ClientSession,
    budgets: Budgets,
    assignment: Assignment,
    result: LocalResult,
    posted: Sequence[tuple[int, float]] = (),
) -> Pending:
    """Pack what local training changed, within the budget, and store it in the session; nothing is sent yet.

    Args:
        session: the client's.
        budgets: of its messages.
        assignment: what was trained.
        result: what came out.
        posted: (round, loss) of evaluations in the mailbox, for budgets that follow them.
    """
    max_bytes, moved = budgets.first.take(
        assignment.round,
        session.spec.rounds,
        loss=result.loss,
        posted=posted,
        messages=assignment.messages,
        carried=session.carried,
    )
    refinement_bytes, _ = budgets.refinement.take(
        assignment.round, session.spec.rounds, messages=assignment.messages, carried={}
    )
    return session.finish(
        assignment.round,
        session.trained.whole.digest(assignment.adapter),
        result.adapter - assignment.adapter if result.delta is None else result.delta,
        fisher=result.fisher,
        num_examples=result.num_examples,
        max_bytes=max_bytes,
        refinement_bytes=refinement_bytes,
        carried={**result.carried, **moved},
        variate=result.variate,
    )
