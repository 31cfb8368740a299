"""The coordinator: collects a round's messages, aggregates them, publishes the next adapter.

It keeps nothing of its own. Everything is read from the mailbox, so it can be killed anywhere and started anywhere:
for the same set of messages the published adapter is the same, bit for bit (`server_step` says for which optimizers on
any processor).
"""

from __future__ import annotations

import dataclasses
import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedfstq_hf.codec import Schema
from fedfstq_hf.errors import (
    MailboxError,
    MailboxUnavailableError,
    NonFiniteError,
    RoundConflictError,
)
from fedfstq_hf.federation import adapter_file, history, scaffold
from fedfstq_hf.federation.aggregation import server_step
from fedfstq_hf.federation.arrivals import Arrivals
from fedfstq_hf.federation.attachments import Joined, SaliencyMaker, join_attachments, sent_bytes
from fedfstq_hf.federation.clipping import Usual
from fedfstq_hf.federation.collecting import Collected, Collector
from fedfstq_hf.federation.control import read_control
from fedfstq_hf.federation.lateness import LOOK_BACK
from fedfstq_hf.federation.mailbox import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    RECORD_FILE,
    SERVER_STATE_FILE,
    SPEC_FILE,
    UPDATE_FILE,
    Mailbox,
    RootFiles,
)
from fedfstq_hf.federation.posted_metrics import read_metrics
from fedfstq_hf.federation.publication import CardMaker, make_record, pack_change, root_files
from fedfstq_hf.federation.record import RoundRecord
from fedfstq_hf.federation.records import Records
from fedfstq_hf.federation.refining import Refined, refine
from fedfstq_hf.federation.screening import Screening, Unseal
from fedfstq_hf.federation.signed_records import Sign
from fedfstq_hf.federation.spec import FederationSpec
from fedfstq_hf.federation.travelling import Travelling
from fedfstq_hf.text import printable, printable_traceback

logger = logging.getLogger(__name__)

_PATIENCE_GROWTH, _LONGEST_WAIT = 1.3, 8.0  # polling slows down to that many times its first interval


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
        self.travelling: Travelling
        self.adapter: Tensor
        self._clock = clock
        self._card = card
        self._unseal = unseal
        self._saliency = saliency
        self._sign = sign
        self._collector: Collector
        self._arrivals: Arrivals
        self._history: list[history.HistoryRow] = []
        head = mailbox.head()
        if head is None:
            raise MailboxError(
                f"{mailbox.address} holds no federation yet. Make one with `fedfstq init {mailbox.address} ...`."
            )
        self.spec = FederationSpec.from_json(mailbox.read(0, SPEC_FILE))
        self._record = Records(mailbox, self.spec, unseal)
        self._adapter_config = mailbox.read(0, ADAPTER_CONFIG_FILE)
        self._load_head(head)
        self._history = history.complete(self.mailbox.read_root, self.record.round, self._record)
        self.refresh()

    @property
    def finished(self) -> bool:
        """Whether the last round is published."""
        return self.record.finished

    @property
    def paused(self) -> str | None:
        """Why no round is closed at present; None while the federation runs."""
        return read_control(self.mailbox).paused

    def ready(self) -> bool:
        """Whether enough messages have arrived, or the deadline has passed and there is at least one."""
        control = read_control(self.mailbox)
        if control.paused is not None:
            return False
        usable, _ = self._arrivals.updates(self.spec.max_staleness)
        heard = [*usable, *self._arrivals.silent(usable)]
        return self._enough(len(self._collector.open(heard, control)))

    def close_round(self) -> RoundRecord | None:
        """Aggregate the messages that lie in the mailbox and publish the next round.

        Returns:
            The new record. None when, after refusals, too few messages are left to close the round: call again later.
            If another coordinator published first, its record is adopted and returned.
        """
        finished = self.record.round + 1 >= self.spec.rounds
        collected = self._collect(finished=finished)
        count = len(collected.accepted)
        if not self._enough(count) and not self._enough(count + self._silent()):
            return None
        return self._publish_mean(collected, finished=finished)

    def stop(self) -> RoundRecord:
        """End the federation now: what has arrived is used, and the round made from it is the last one."""
        self._refuse_finished("stopped")
        while not self.finished:  # a coordinator that publishes at this moment only delays it
            self._publish_mean(self._collect(finished=True), finished=True)
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
            finished = self.record.round + 1 >= self.spec.rounds
            usable, late = self._arrivals.updates(self._look_back(finished))
            usable += self._arrivals.refinements()
            state = self._server_state(round)
            files = {} if state is None else {SERVER_STATE_FILE: state}  # control variates begin anew, with zeros
            record = self._next_record(
                adapter,
                finished=finished,
                refused=tuple(self._arrivals.unused(ref, f"Rolled back to round {round}.") for ref in usable),
                late=self._arrivals.late([*late, *self._arrivals.late_refinements(self._look_back(finished))]),
                restored_from=round,
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
        wait, paused = poll_seconds, False
        while not self.finished:
            record = self.close_round() if self.ready() else self._other_head()
            if record is not None:
                wait = poll_seconds
                if on_round is not None:
                    on_round(record)
            elif once:
                break
            else:
                if (self.paused is not None) != paused:
                    paused = not paused
                    logger.info("Paused: %s" if paused else "Going on.%s", printable(self.paused or ""))
                sleep(self._until_deadline(wait) * random.uniform(0.8, 1.2))
                wait = min(wait * _PATIENCE_GROWTH, poll_seconds * _LONGEST_WAIT)
        return self.record

    def _load_head(self, head: int) -> None:
        self.record = self._record(head)
        data = self.mailbox.read(head, ADAPTER_FILE)
        state = adapter_file.load(data, expected_sha256=self.record.adapter_sha256)
        self.schema = Schema.from_state_dict(state)
        self.travelling = self.spec.travelling(self.schema)
        self.adapter = self.schema.flatten(state)
        self._open_round()

    def _open_round(self) -> None:
        max_bytes = self._screening().max_bytes
        self._arrivals = Arrivals(self.mailbox, self.spec, self.record.round, self._record, max_bytes=max_bytes)
        self._collector = self._collector_of(self.record.round)

    def _collector_of(self, round: int) -> Collector:
        return Collector(
            self.mailbox,
            round,
            num_params=self.travelling.schema.num_params,
            base=lambda round: self._record(round).adapter_sha256,
            selected=lambda round: self._record(round).selected,
            usual=lambda: Usual.of(self._record(round), self.adapter),
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
        late = self.record.deadline is not None and self._clock() >= self.record.deadline
        return count >= (1 if late else self.spec.min_clients)

    def _until_deadline(self, wait: float) -> float:
        deadline = self.record.deadline
        return wait if deadline is None else min(wait, max(deadline - self._clock(), 0.05))

    def _screening(self) -> Screening:
        return Screening(self.spec, self.travelling.schema, read_control(self.mailbox), self._unseal)

    def _look_back(self, finished: bool) -> int:
        """How many closed rounds are looked at for messages that no record names."""
        return self.record.round if finished else max(self.spec.max_staleness + 1, LOOK_BACK)

    def _collect(self, *, finished: bool = False) -> Collected:
        back = self._look_back(finished)
        usable, late = self._arrivals.updates(back)
        late = [*late, *self._arrivals.late_refinements(back)]
        return dataclasses.replace(self._collector.collect(usable, self._screening()), late=self._arrivals.late(late))

    def _silent(self) -> int:
        """How many clients have no preview in the open round, and a refinement that can be used a round later."""
        usable, _ = self._arrivals.updates(self.spec.max_staleness)
        refs = self._arrivals.silent(usable)
        return len(self._collector.collect(refs, self._screening()).accepted) if refs else 0

    def _refine(self) -> Refined | None:
        """What refinements change about the last round; None where there are none, or that round was rolled back."""
        record = self.record
        if not record.round or not self.spec.refines(record.round - 1) or record.restored_from is not None:
            return None
        if record.hides_figures:
            raise MailboxError(
                f"What the updates of round {record.round - 1} weighed is sealed to {self.spec.sealing_key}: start the "
                "coordinator with its key file."
            )
        previews = {ref.client_id: ref for ref in self._arrivals.of(record.round - 1)}
        refinements = {ref.client_id: ref for ref in self._arrivals.refinements()}
        return refine(self._collector_of(record.round - 1), record, previews, refinements, self._screening())

    def _publish_mean(self, collected: Collected, *, finished: bool) -> RoundRecord:
        server_state: bytes | None
        refined = self._refine()
        stopped = self._arrivals.stopped() if finished else ()
        if collected.accepted or refined is not None:
            part, server_state = server_step(
                self.travelling.take(self.adapter),
                self._mean_update(collected, refined, finished),
                self.spec.server,
                self._server_state(self.record.round),
                self.record.round / max(1, self.spec.rounds - 1),
            )
            change = self.travelling.put(part)
        else:  # an end without any update
            change = torch.zeros_like(self.adapter)
            server_state = self._server_state(self.record.round)
        adapter = self.adapter + change
        if not bool(adapter.isfinite().all()):
            raise NonFiniteError(
                f"The server optimizer {dict(self.spec.server)} made round {self.record.round + 1} infinite or NaN; "
                "nothing was published. Start a federation with a smaller server learning rate."
            )
        data = adapter_file.dump(self.schema.unflatten(adapter))
        shown = () if self.spec.sealing_key is not None else collected.accepted
        packed = pack_change(change, self.record, self.schema, sum(entry.num_examples for entry in shown))
        files = self._files(server_state, packed if len(packed) < len(data) else None, collected.variates)
        attached = Joined({})
        if finished and self.spec.share_saliency and self._saliency is not None:
            attached = join_attachments(
                self.mailbox, self.record, collected.accepted, self._screening(), self._saliency
            )
        record = self._next_record(
            data,
            finished=finished,
            unpublished=attached.unpublished,
            accepted=collected.accepted,
            refinements=refined.used if refined is not None else (),
            refused=(*collected.refused, *(refined.refused if refined is not None else ()), *stopped),
            late=collected.late,
            update_bytes=len(packed) if UPDATE_FILE in files else None,
            **scaffold.record_fields(files),
        )
        return self._publish(record, data, files, attached.files)

    def _mean_update(self, collected: Collected, refined: Refined | None, finished: bool) -> Tensor:
        """What the server steps along; see `federation.refining`."""
        mean = collected.mean.result() if collected.accepted else torch.zeros(self.travelling.schema.num_params)
        if self.spec.refines(self.record.round) and not finished:  # else nothing follows
            mean = self.spec.preview_step * mean
        return mean if refined is None else mean + refined.change

    def _files(self, server_state: bytes | None, packed: bytes | None, variates: Tensor | None) -> dict[str, bytes]:
        """What is published beside adapter and record."""
        files = {SERVER_STATE_FILE: server_state, UPDATE_FILE: packed}
        variate = scaffold.next_variate(self.mailbox, self.record, self.spec, self.schema.num_params, variates)
        return {**{name: data for name, data in files.items() if data is not None}, **variate}

    def _next_record(self, adapter: bytes, *, finished: bool, **fields: Any) -> RoundRecord:
        round = self.record.round + 1
        selected = None
        if not finished:
            selected = read_control(self.mailbox).select(round, self.spec.seed, self.spec.clients_per_round)
        elif self.spec.share_saliency:
            seen = {entry.client_id for kind in ("accepted", "refused", "late") for entry in fields.get(kind, ())}
            fields["attached_bytes"] = sent_bytes(self.mailbox, seen.union(read_control(self.mailbox).clients or ()))
        fields |= {"finished": finished, "selected": selected, "sign": self._sign}
        return make_record(self.spec, adapter, round, self._clock(), **fields)

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
            keep_rounds=self.spec.max_staleness + (2 if self.spec.refinement_budget is None else 3),
            tag=record.finished or record.round % self.spec.tag_every == 0,
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
