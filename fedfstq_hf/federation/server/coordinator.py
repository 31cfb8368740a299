"""The coordinator: collects a round's messages, aggregates them, publishes the next adapter.

It keeps nothing of its own. Everything is read from the mailbox, so it can be killed anywhere and started anywhere:
for the same set of messages the published adapter is the same, bit for bit (`server_step` says for which optimizers on
any processor).
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedfstq_hf.codec import Schema
from fedfstq_hf.codec.schema import TrainedPart
from fedfstq_hf.errors import MailboxError, MailboxUnavailableError, NonFiniteError, RoundConflictError, no_federation
from fedfstq_hf.federation import adapter_file, history, scaffold
from fedfstq_hf.federation.aggregation import keeps_state, server_step
from fedfstq_hf.federation.control import Rules, read_control, rules
from fedfstq_hf.federation.envelope import Records
from fedfstq_hf.federation.frames import Share, initial_adapter
from fedfstq_hf.federation.keys import Sign, Unseal
from fedfstq_hf.federation.mailbox.posted_metrics import read_metrics
from fedfstq_hf.federation.mailbox.protocol import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    RECORD_FILE,
    RESIDUAL_FILE,
    SERVER_STATE_FILE,
    SPEC_FILE,
    Mailbox,
    Polling,
    RootFiles,
)
from fedfstq_hf.federation.record import RoundRecord, listed
from fedfstq_hf.federation.server.attachments import Joined, SaliencyMaker, join_attachments, sent_bytes
from fedfstq_hf.federation.server.collecting import Collected
from fedfstq_hf.federation.server.framing import Framing, read_residual, residual_fields, residual_file
from fedfstq_hf.federation.server.open_round import OpenRound
from fedfstq_hf.federation.server.publication import CardMaker, make_record, root_files
from fedfstq_hf.federation.server.refining import Refined
from fedfstq_hf.federation.spec import FederationSpec
from fedfstq_hf.text import printable, printable_traceback

logger = logging.getLogger(__name__)
_TAG_EVERY = 10  # rounds between two tags of the Hub repo


class Coordinator:
    """Runs the rounds of one mailbox.

    Args:
        mailbox: holds a federation made by `found_federation`.
        clock: seconds since the epoch; a simulation passes its own.
        card: makes the root's readable files for each round.
        unseal: opens sealed messages.
        sign: signs records with the founder's key, where the spec names one.
        saliency: joins the token sensitivities that clients attached to the last round; None leaves them.
    """

    def __init__(
        self,
        mailbox: Mailbox,
        *,
        clock: Callable[[], float] = time.time,
        card: CardMaker | None = None,
        unseal: Unseal | None = None,
        sign: Sign | None = None,
        saliency: SaliencyMaker | None = None,
    ) -> None:
        self.mailbox = mailbox
        self.record: RoundRecord
        self.schema: Schema
        self.trained: TrainedPart
        self.adapter: Tensor
        self._clock = clock
        self._card = card
        self._unseal = unseal
        self._saliency = saliency
        self._sign = sign
        self._round: OpenRound
        self._initial: Tensor
        self._history: list[history.HistoryRow] = []
        head = mailbox.head()
        if head is None:
            raise no_federation(mailbox.address)
        self.spec = FederationSpec.from_json(mailbox.read(0, SPEC_FILE))
        self._record = Records(mailbox, self.spec, unseal)
        self._adapter_config = mailbox.read(0, ADAPTER_CONFIG_FILE)
        self._load_head(head)
        self._initial = self.adapter
        if head and self.spec.downlink.keyframe is not None:
            self._initial, _ = initial_adapter(mailbox, self._record(0), self.spec, self.schema)
        self._history = history.complete(self.mailbox.read_root, self.record.round, self._record)
        self.refresh()

    @property
    def finished(self) -> bool:
        """Whether the last round is published."""
        return self.record.finished

    @property
    def rules(self) -> Rules:
        """When rounds close and the federation ends, as of the last look at the control file."""
        return rules(self.spec, read_control(self.mailbox))

    @property
    def paused(self) -> str | None:
        """Why no round is closed at present; None while the federation runs."""
        return read_control(self.mailbox).paused

    def ready(self) -> bool:
        """Whether enough messages have arrived, or the deadline has passed and there is at least one."""
        control = read_control(self.mailbox)
        if control.paused is not None:
            return False
        return self._enough(self._round.heard(control))

    def close_round(self) -> RoundRecord | None:
        """Aggregate the messages that lie in the mailbox and publish the next round.

        Returns:
            The new record. None when, after refusals, too few messages are left to close the round: call again later.
            If another coordinator published first, its record is adopted and returned.
        """
        finished = self.record.round + 1 >= self.rules.rounds
        collected = self._round.collect(finished=finished)
        count = len(collected.accepted)
        if not self._enough(count) and not self._enough(count + self._round.silent()):
            return None
        return self._publish_mean(collected, finished=finished)

    def stop(self) -> RoundRecord:
        """End the federation now: what has arrived is used, and the round made from it is the last one."""
        self._refuse_finished("stopped")
        while not self.finished:  # a coordinator that publishes at this moment only delays it
            self._publish_mean(self._round.collect(finished=True), finished=True)
        return self.record

    def rollback(self, round: int) -> RoundRecord:
        """Publish the adapter and server state of an earlier round as the next one; waiting updates are refused.

        Clients drop what they kept of the rounds in between (`ClientSession.undo`).

        Raises:
            MailboxError: there is no such round, or the mailbox no longer holds its adapter.
        """
        self._refuse_finished("rolled back")
        if not 0 <= round < self.record.round:
            raise MailboxError(
                f"Cannot roll back to round {round}: the newest is {self.record.round}. Give a round from 0 to "
                f"{self.record.round - 1}."
            )
        adapter = self.mailbox.read(round, ADAPTER_FILE)
        adapter_file.load(adapter, expected_sha256=self._record(round).adapter_sha256)
        while True:
            finished = self.record.round + 1 >= self.rules.rounds
            refused, late = self._round.refuse_all(f"Rolled back to round {round}.", finished=finished)
            kept = {
                SERVER_STATE_FILE: self._server_state(round),
                RESIDUAL_FILE: residual_file(self.mailbox, self._record(round)),
            }
            files = {name: data for name, data in kept.items() if data is not None}  # variates begin anew, with zeros
            record = self._next_record(
                adapter,
                finished=finished,
                refused=refused,
                late=late,
                restored_from=round,
                **residual_fields(files),
            )
            if self._publish(record, adapter, files) is record:
                return record
            self._refuse_finished("rolled back")  # somebody else published first, and perhaps the last round

    def refresh(self) -> None:
        """Renew the root's files, with the metrics that were posted meanwhile."""
        self.mailbox.refresh_root(self._root(self.record, self._history))

    def serve(
        self,
        *,
        poll_seconds: float = 2.0,
        once: bool = False,
        on_round: Callable[[RoundRecord], None] | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> RoundRecord:
        """Close rounds until the federation is finished; returns the last record.

        Args:
            poll_seconds: between two looks at the mailbox at first; while nothing arrives they grow rarer.
            once: close only what is ready now.
            on_round: is told each new record.
            sleep: a test or simulation passes its own.
        """
        polling, paused = Polling(poll_seconds, jitter=0.2, sleep=sleep), False
        while not self.finished:
            record = self.close_round() if self.ready() else self._other_head()
            if record is not None:
                polling.reset()
                if on_round is not None:
                    on_round(record)
            elif once:
                break
            else:
                if (self.paused is not None) != paused:
                    paused = not paused
                    logger.info("Paused: %s" if paused else "Going on.%s", printable(self.paused or ""))
                polling.pause(self._until_deadline())
        return self.record

    def _load_head(self, head: int) -> None:
        self.record = self._record(head)
        data = self.mailbox.read(head, ADAPTER_FILE)
        state = adapter_file.load(data, expected_sha256=self.record.adapter_sha256)
        self.schema = Schema.from_state_dict(state)
        self.trained = self.spec.trained_part(self.schema)
        self.adapter = self.schema.flatten(state)
        self._open_round()

    def _open_round(self) -> None:
        self._round = OpenRound(
            self.mailbox,
            self.spec,
            self.record,
            self._record,
            self.trained,
            self.adapter,
            self._unseal,
            self._overdue,
        )

    def _other_head(self) -> RoundRecord | None:
        """Adopt a round that somebody else published (a stop, a rollback, a second coordinator)."""
        head = self.mailbox.head()
        if head is None or head <= self.record.round:
            return None
        self._adopt(head)
        return self.record

    def _adopt(self, head: int) -> None:
        self._load_head(head)
        self._history = history.complete(self.mailbox.read_root, self.record.round, self._record)

    def _enough(self, count: int) -> bool:
        return count >= (1 if self._overdue() else self.rules.min_clients)

    def _overdue(self) -> bool:
        return self.record.deadline is not None and self._clock() >= self.record.deadline

    def _until_deadline(self) -> float:
        deadline = self.record.deadline
        return math.inf if deadline is None else max(deadline - self._clock(), 0.05)

    def _publish_mean(self, collected: Collected, *, finished: bool) -> RoundRecord:
        server_state: bytes | None
        refined = self._round.refine()
        stopped = self._round.inbox.stopped() if finished else ()
        if collected.accepted or refined is not None:
            part, server_state = server_step(
                self.trained.take(self.adapter),
                self._mean_update(collected, refined, finished),
                self.spec.method.server.to_yaml(),
                self._server_state(self.record.round),
                min(1.0, self.record.round / max(1, self.spec.rounds - 1)),
            )
            change = self.trained.put(part)
        else:  # an end without any update
            change = torch.zeros_like(self.adapter)
            server_state = self._server_state(self.record.round)
        if not bool((self.adapter + change).isfinite().all()):
            raise NonFiniteError(
                f"The server optimizer {self.spec.method.server.to_yaml()} made round {self.record.round + 1} infinite "
                "or NaN; nothing was published. Start a federation with a smaller server learning rate."
            )
        framing = Framing(self.spec, self.schema, self.record, self._initial, self.adapter)
        residual = read_residual(self.mailbox, self.record, self.schema.num_params)
        shares = self._forwarded(collected, refined, server_state)
        framed = framing.framed(change, residual, shares, last=finished)
        data = adapter_file.dump(self.schema.unflatten(framed.adapter))
        files = self._files(server_state, collected.variates) | framed.files()
        attached = Joined({})
        if finished and self.spec.share_saliency and self._saliency is not None:
            attached = join_attachments(
                self.mailbox, self.record, collected.accepted, self._round.screening(), self._saliency
            )
        record = self._next_record(
            data,
            finished=finished,
            unpublished=attached.unpublished,
            accepted=collected.accepted,
            refinements=refined.used if refined is not None else (),
            refused=(*collected.refused, *(refined.refused if refined is not None else ()), *stopped),
            late=collected.late,
            frames=listed(self.record.frames, framed.frame, len(data)),
            **residual_fields(files),
            **(scaffold.record_fields(files) if self.spec.method.scaffold else {}),
        )
        return self._publish(record, data, files, attached.files)

    def _mean_update(self, collected: Collected, refined: Refined | None, finished: bool) -> Tensor:
        """What the server steps along; see `federation.server.refining`."""
        mean = collected.mean.result() if collected.accepted else torch.zeros(self.trained.schema.num_params)
        if self.spec.refines(self.record.round) and not finished:  # else nothing follows
            mean = self.spec.method.preview_step * mean
        return mean if refined is None else mean + refined.change

    def _forwarded(self, collected: Collected, refined: Refined | None, server_state: bytes | None) -> Sequence[Share]:
        """The messages from which who holds the adapter can make the server's step; empty where that cannot be."""
        method = self.spec.method
        alone = refined is None and method.refinement_budget is None and not method.scaffold
        return collected.shares if self.spec.forwards and alone and not keeps_state(server_state) else ()

    def _files(self, server_state: bytes | None, variates: Tensor | None) -> dict[str, bytes]:
        """What is published beside adapter, record and frame."""
        made = {} if server_state is None else {SERVER_STATE_FILE: server_state}
        if self.spec.method.scaffold:
            made |= scaffold.next_variate(self.mailbox, self.record, self.spec, self.schema.num_params, variates)
        return made

    def _next_record(self, adapter: bytes, *, finished: bool, **fields: Any) -> RoundRecord:
        round = self.record.round + 1
        selected = None
        if not finished:
            selected = read_control(self.mailbox).select(round, self.spec.seed, self.spec.clients_per_round)
        elif self.spec.share_saliency:
            seen = {entry.client_id for kind in ("accepted", "refused", "late") for entry in fields.get(kind, ())}
            fields["attached_bytes"] = sent_bytes(self.mailbox, seen.union(read_control(self.mailbox).clients or ()))
        fields |= {"finished": finished, "selected": selected, "sign": self._sign}
        return make_record(self.spec, adapter, round, self._clock(), seconds=self.rules.round_seconds, **fields)

    def _publish(
        self,
        record: RoundRecord,
        adapter: bytes,
        others: Mapping[str, bytes],
        attached: Mapping[str, bytes] | None = None,
    ) -> RoundRecord:
        files = {
            RECORD_FILE: record.to_json(),
            ADAPTER_FILE: adapter,
            ADAPTER_CONFIG_FILE: self._adapter_config,
            **others,
        }
        rows = [*self._history, history.row(record, self.record)]
        try:
            self.mailbox.publish(record.round, files, self._root(record, rows, attached))
        except RoundConflictError:
            logger.warning("Another coordinator published round %d first; going on from its result.", record.round)
            self._adopt(max(self.mailbox.head() or 0, record.round))
            self.refresh()
            return self.record
        self.record, self._history = record, rows
        self._record.add(record)
        self.adapter = self.schema.flatten(adapter_file.load(adapter))
        self._open_round()
        self.mailbox.housekeep(
            record.round,
            clients=len(record.updates),
            keep_rounds=self.spec.method.max_staleness + (2 if self.spec.method.refinement_budget is None else 3),
            tag=record.finished or record.round % _TAG_EVERY == 0,
            finished=record.finished,
        )
        return self.record

    def _root(
        self, record: RoundRecord, rows: Sequence[history.HistoryRow], attached: Mapping[str, bytes] | None = None
    ) -> RootFiles:
        card, metrics = self._card, {}
        if card is not None:
            control = read_control(self.mailbox)
            clients = sorted(control.clients or {entry.client_id for entry in record.updates})
            try:
                metrics = read_metrics(self.mailbox, clients, up_to=record.round)
            except Exception as error:
                logger.warning("No card without the posted metrics:\n%s", printable_traceback(error))
                card = None
        return root_files(self.spec, record, rows, metrics, self._adapter_config, card, attached)

    def _refuse_finished(self, what: str) -> None:
        if self.finished:
            raise MailboxError(f"{self.mailbox.address} is finished already; it cannot be {what}.")

    def _server_state(self, round: int) -> bytes | None:
        if round == 0:
            return None
        try:
            return self.mailbox.read(round, SERVER_STATE_FILE)
        except MailboxUnavailableError:
            raise
        except MailboxError:
            if self._record(round).accepted:
                raise
            return None  # restored from a round without one
