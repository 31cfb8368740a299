"""One method and seed of a simulated federation, as the work of one long `FedFSTQTrainer.take_part`.

Real sessions, codec, mailbox and coordinator; the trainer is handed one client after the other. Everything is in the
mailbox, the clients' state folders and the rows written so far, so a run that was killed goes on where it stopped.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fedfstq_hf.errors import FedFSTQError
from fedfstq_hf.federation import storage
from fedfstq_hf.federation.client.participation import Assignment, LocalResult, local_seed, store_message
from fedfstq_hf.federation.client.session import Caps, ClientSession, says_nothing_yet
from fedfstq_hf.federation.frames import drawn
from fedfstq_hf.federation.mailbox.folder import FolderMailbox
from fedfstq_hf.federation.mailbox.protocol import ADAPTER_CONFIG_FILE, RECORD_FILE, SPEC_FILE
from fedfstq_hf.federation.record import KEYFRAME, RoundRecord, expected_messages
from fedfstq_hf.federation.scaffold import read_variate
from fedfstq_hf.federation.server.coordinator import Coordinator
from fedfstq_hf.recipe.network import Delivery, LinkProfile, LinkRates, deliver, round_cost
from fedfstq_hf.simulation.population import RoundPlan
from fedfstq_hf.simulation.workers import client_name, open_budgets, open_session

FOUNDED = 1_700_000_000.125
"""The hour of all that a simulation publishes, so that the same runs have the same bytes; as long as a real one."""

Row = dict[str, Any]
TrainElsewhere = Callable[[int, Sequence[int], Tensor, str, int], Mapping[int, float]]


class SimulatedParticipation:
    """Hands out the clients of each round in turn, then closes the round, evaluates it and writes its row.

    Args:
        folder: of this method and seed; holds `mailbox/` and `clients/`.
        label: `{"method": ..., "seed": ...}`, the first columns of each row.
        plan: who takes part in which round; the same for all methods of a seed.
        datasets: the clients' data.
        links: profile and drawn rates per link.
        evaluate: measures an adapter, (num_params,) -> metrics with `metric` among them.
        rows: of this method and seed as written before an interruption.
        emit: takes each new row.
        train: trains clients elsewhere, (round, indices, adapter, its sha256, messages expected) -> seconds by index,
            leaving their messages in their sessions; None hands them out one by one.
        caps: of each client's messages.
        loss: of a packet, `retransmissions` and seed of the uplink, as `packets.deliver` takes them.
        expected: messages of the first round, for budgets that are a round's.
        link_params: numbers of the adapter that the links' rates were set by.
    """

    def __init__(
        self,
        folder: Path,
        *,
        label: Mapping[str, Any],
        plan: Sequence[RoundPlan],
        datasets: Sequence[Any],
        links: Sequence[tuple[LinkProfile, LinkRates]],
        evaluate: Callable[[Tensor], Mapping[str, float]],
        rows: Sequence[Row],
        emit: Callable[[Row], None],
        train: TrainElsewhere | None = None,
        caps: Sequence[Caps] | None = None,
        loss: tuple[float, int, int] = (0.0, 0, 0),
        expected: int = 1,
        link_params: int | None = None,
    ) -> None:
        self._folder = folder
        self._label = dict(label)
        self._plan = plan
        self._datasets = datasets
        self._links = links
        self._evaluate = evaluate
        self._emit = emit
        self._train = train
        self._caps = caps if caps is not None else [Caps()] * len(datasets)
        self._loss, self._expected, self._link_params = loss, expected, link_params
        self._last_row: Row | None = rows[-1] if rows else None
        storage.make_folder(folder / "sent", durable=False)
        self.mailbox = FolderMailbox(folder / "mailbox", durable=False)
        self.coordinator = Coordinator(self.mailbox, clock=lambda: FOUNDED)
        self.spec = self.coordinator.spec
        self._budgets = open_budgets(self.spec, self.coordinator.schema)
        self._sessions: dict[int, ClientSession] = {}
        self._compute: dict[int, float] = {}
        self._started = 0.0
        self._records: dict[int, RoundRecord] = {}
        initial = drawn(self.coordinator.schema, self.spec.seed)
        self._drawn = initial is not None and self._is_initial(initial)
        left = sum(len(round_plan.survivors) for round_plan in plan[self.coordinator.record.round :])
        self.total_steps = left * self.spec.local_steps

    def next(self) -> Assignment | None:
        """The next client of the round; closes the round first where all have sent."""
        while True:
            record = self.coordinator.record
            if self._last_row is None or self._last_row["round"] < record.round:
                self._finish_row(record)
            if record.finished:
                self.close()
                return None
            if self._train is not None:
                self._train_elsewhere(record, self._train)
            for index in self._plan[record.round].survivors:
                session = self._open(index)
                if session.last_round < record.round:
                    self._started = time.perf_counter()
                    return Assignment(
                        round=record.round,
                        session=session,
                        adapter=self.coordinator.adapter,
                        adapter_sha256=record.adapter_sha256,
                        seed=local_seed(self.spec.seed, session.client_id, record.round),
                        dataset=self._datasets[index],
                        variate=read_variate(self.mailbox, record, self.spec, self.coordinator.schema.num_params),
                        messages=self._messages(record),
                    )
            self._send(record.round)
            if self.coordinator.close_round() is None:
                raise FedFSTQError(
                    f"{self._label}: round {record.round} could not be closed: the coordinator refused every update."
                )

    def complete(self, assignment: Assignment, result: LocalResult) -> dict[str, float]:
        """Store the client's message; the round's are sent when all are there."""
        session = assignment.session
        store_message(session, self._budgets, assignment, result)
        index = next(i for i, opened in self._sessions.items() if opened is session)
        self._compute[index] = time.perf_counter() - self._started
        return {}

    def final_adapter(self) -> Tensor | None:
        """The global adapter."""
        return self.coordinator.adapter

    def close(self) -> None:
        """Release the clients' state folders."""
        for session in self._sessions.values():
            session.close()
        self._sessions.clear()

    def _send(self, round: int) -> None:
        """Post the messages that come through. What was sent is written down first: a lost message leaves no record.

        The coordinator closes the round with the first ones; refinements wait there for the next.
        """
        held = {index: self._open(index).pending for index in self._plan[round].survivors}
        pending = {index: stored for index, stored in held.items() if stored is not None}
        first = {index: stored.message for index, stored in pending.items() if not says_nothing_yet(stored)}
        second = {index: stored.refinement for index, stored in pending.items() if stored.refinement is not None}
        for messages, refinements in ((first, False), *([(second, True)] if second else [])):
            sizes = json.dumps({index: len(message) for index, message in messages.items()})
            storage.replace_file(self._sent_file(round, refinements), sizes.encode(), durable=False)
            for index in self._deliver(round, refinements).arrived:
                self.mailbox.post_update(round, client_name(index), messages[index], refinement=refinements)

    def _deliver(self, round: int, refinements: bool = False) -> Delivery:
        loss, retransmissions, seed = self._loss
        return deliver(
            self._sent(round, refinements),
            loss=loss,
            retransmissions=retransmissions,
            seed=seed,
            round=round,
            refinements=refinements and bool(self._sent(round)),  # without a first message these are waited for
        )

    def _sent(self, round: int, refinements: bool = False) -> dict[int, int]:
        """Bytes of each client's message of a round, or of its refinement."""
        path = self._sent_file(round, refinements)
        if refinements and not path.exists():
            return {}
        return {int(index): size for index, size in json.loads(path.read_bytes()).items()}

    def _sent_file(self, round: int, refinements: bool) -> Path:
        return self._folder / "sent" / f"{round:06d}{'-refinements' if refinements else ''}.json"

    def _train_elsewhere(self, record: RoundRecord, train: TrainElsewhere) -> None:
        survivors = self._plan[record.round].survivors
        left = [index for index in survivors if self._open(index).last_round < record.round]
        self.close()  # a session belongs to one process at a time
        if left:
            messages = self._messages(record)
            self._compute |= train(record.round, left, self.coordinator.adapter, record.adapter_sha256, messages)

    def _messages(self, record: RoundRecord) -> int:
        return expected_messages(record, self._expected)

    def _open(self, index: int) -> ClientSession:
        if index not in self._sessions:
            session = open_session(self._folder, index, self.spec, self.coordinator.schema, self._caps[index])
            if session.pending is not None and session.pending.round < self.coordinator.record.round:
                session.settle(self._record(session.pending.round + 1))
            self._sessions[index] = session
        return self._sessions[index]

    def _is_initial(self, adapter: Tensor) -> bool:
        return self.coordinator.schema.digest(adapter) == self._record(0).adapter_digest

    def _record(self, round: int) -> RoundRecord:
        if round not in self._records:
            self._records[round] = RoundRecord.from_json(self.mailbox.read(round, RECORD_FILE))
        return self._records[round]

    def _finish_row(self, record: RoundRecord) -> None:
        """Settle the round's clients, measure the adapter and write the row."""
        previous, round = self._last_row, record.round
        row: Row = {**self._label, "round": round}
        if round == 0 or previous is None:
            row |= self._evaluate(self.coordinator.adapter)
            row |= {
                "uplink_bytes": 0,
                "downlink_bytes": 0,
                "cumulative_uplink_bytes": 0,
                "cumulative_downlink_bytes": 0,
            }
            row["num_params"] = self._link_params
            row |= {"seconds": {profile.name: 0.0 for profile, _ in self._links}, "num_updates": 0, "num_dropped": 0}
        else:
            plan = self._plan[round - 1]
            norms = []
            for index in plan.survivors:
                session = self._open(index)
                if session.pending is not None and session.pending.round == round - 1:
                    session.settle(record)
                norms.append(session.residual_norm())
            self.close()
            row |= self._evaluate(self.coordinator.adapter)
            row |= self._costs(record, plan, previous)
            row["residual_norm"] = sum(norms) / len(norms)
        self._emit(row)
        self._last_row = row
        self._compute.clear()

    def _costs(self, record: RoundRecord, plan: RoundPlan, previous: Row) -> Row:
        sizes, refinements = (self._sent(record.round - 1, second) for second in (False, True))
        waited_for, following = (self._deliver(record.round - 1, second) for second in (False, True))
        num_lost = len(sizes) - len(waited_for.arrived)
        if not sizes:  # no preview says anything: the round waits for what would follow
            waited_for, following = following, waited_for
        downlink = {index: self._downlink(index, record.round - 1) for index in plan.sampled}
        # After an interruption some clients' times are unknown; the mean of those that are known stands for them.
        known = list(self._compute.values()) or [previous.get("compute_seconds", 0.0)]
        typical = sum(known) / len(known)
        compute = {index: self._compute.get(index, typical) for index in plan.survivors}
        seconds, energy, backlog = {}, {}, {}
        for profile, rates in self._links:
            before = previous.get("backlog", {}).get(profile.name, {})
            cost = round_cost(
                profile,
                rates,
                uplink_bytes=waited_for.air_bytes,
                downlink_bytes=downlink,
                compute_seconds=compute,
                refinement_bytes=following.air_bytes,
                backlog={int(index): left for index, left in before.items()},
            )
            backlog[profile.name] = {str(index): left for index, left in cost.backlog.items()}
            seconds[profile.name] = previous["seconds"][profile.name] + cost.seconds
            energy[profile.name] = {"mean": cost.energy_mean, "straggler": cost.energy_straggler}
        up, down = sum(sizes.values()) + sum(refinements.values()), sum(downlink.values())
        refined: Row = {}
        if refinements:
            behind = [following.air_bytes.get(index, 0) for index in compute]
            refined = {"backlog": backlog, "client_refinement_bytes": behind}
        return {
            "uplink_bytes": up,
            "downlink_bytes": down,
            "air_bytes": sum(waited_for.air_bytes.values()) + sum(following.air_bytes.values()),
            "cumulative_uplink_bytes": previous["cumulative_uplink_bytes"] + up,
            "cumulative_downlink_bytes": previous["cumulative_downlink_bytes"] + down,
            "seconds": seconds,
            "num_updates": len(record.accepted),
            "num_dropped": plan.num_dropped,
            "num_lost": num_lost,
            "attempts": waited_for.attempts,
            "compute_seconds": sum(compute.values()) / len(compute),
            "energy": energy,
            "clients": list(compute),
            "client_air_bytes": [waited_for.air_bytes.get(index, 0) for index in compute],
            "client_downlink_bytes": [downlink[index] for index in compute],
            "client_compute_seconds": list(compute.values()),
            **refined,
        }

    def _downlink(self, index: int, round: int) -> int:
        """Bytes that client `index` downloads to begin `round`, given when it was sampled before.

        The adapter's, records of this round and of the one that settled its last message, and at first what the
        federation was founded with. Who is not asked sleeps.
        """
        before = [earlier for earlier in range(round) if index in self._plan[earlier].sampled]
        held, has_initial, path_bytes = None, self._drawn, 0
        for earlier in (*before, round):
            record = self._record(earlier)
            path = record.path_from(held, 0 if has_initial else self._record(0).adapter_bytes)
            first = path.frames[0] if path.frames else None
            begins = first is not None and (first.kind == KEYFRAME or first.round == 1)
            has_initial = has_initial or begins or earlier == 0
            held, path_bytes = earlier, path.num_bytes
        if self._drawn and round == 0:
            path_bytes = 0
        contact = 0 if before else sum(self._size(0, name) for name in (SPEC_FILE, ADAPTER_CONFIG_FILE, RECORD_FILE))
        settled = self._size(before[-1] + 1, RECORD_FILE) if before and before[-1] + 1 < round else 0
        records = settled + (self._size(round, RECORD_FILE) if round else 0)
        return contact + records + path_bytes + self._record(round).variate_bytes

    def _size(self, round: int, name: str) -> int:
        return len(self.mailbox.read(round, name))
