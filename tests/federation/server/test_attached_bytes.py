"""What clients send beside their updates counts as bytes that were sent, whether it was used, refused or not read."""

import pytest
from light import LightClient, found, run_rounds
from light_updates import found_enrolled

from fedfstq_hf.codec.message import MAX_CONTAINER
from fedfstq_hf.federation import history
from fedfstq_hf.federation.mailbox.protocol import SALIENCY_FILE
from fedfstq_hf.federation.record import RoundRecord
from fedfstq_hf.federation.server.attachments import MAX_BYTES
from fedfstq_hf.federation.server.coordinator import Coordinator
from fedfstq_hf.reporting.card.facts import totals
from fedfstq_hf.reporting.status import render_status
from fedfstq_hf.reporting.units import format_bytes

SHARED = {"share_saliency": True, "rounds": 2}


class Sharing(LightClient):
    """A light client that attaches `data`; what it logs of each round is kept."""

    def __init__(self, mailbox, client_id, data):
        super().__init__(mailbox, client_id, None)
        self.participation.uplink.saliency = lambda carried: data
        self.logged = []
        complete = self.participation.complete
        self.participation.complete = lambda *args: self.logged.append(complete(*args)) or self.logged[-1]


def join(found):
    """Publishes what can be read."""
    return {SALIENCY_FILE: b"".join(data for data, _ in found)}


def on_the_wire(mailbox, names):
    """Bytes of the files that these clients sent: what they attached, each in a container like a message's."""
    return sum((mailbox.path / "attachments" / name / SALIENCY_FILE).stat().st_size for name in names)


def run(mailbox, sizes, saliency=join):
    """A federation whose clients attach that many bytes; returns its last record and all its rows."""
    clients = [Sharing(mailbox, name, bytes(size)) for name, size in sizes.items()]
    coordinator = Coordinator(mailbox, saliency=saliency)
    run_rounds(coordinator, clients)
    rows = history.load(mailbox.read_root("history.jsonl"))
    return coordinator.record, rows, clients


@pytest.mark.parametrize("saliency", [join, None])
def test_they_count_in_record_history_card_status_and_the_client_s_log(tmp_path, saliency):
    mailbox = found(tmp_path, **SHARED)
    record, rows, clients = run(mailbox, {"a": 3001, "b": 40_000}, saliency)
    attached = on_the_wire(mailbox, "ab")
    assert 43_001 < attached < 43_001 + 2 * MAX_CONTAINER
    messages = sum(update.num_bytes for update in record.accepted)
    assert record.attached_bytes == attached
    assert record.uplink_bytes == rows[2].uplink_bytes == messages + attached
    assert rows[1].uplink_bytes == messages  # nothing is attached before the last round
    logged = [[row["fed_uplink_bytes"] for row in client.logged] for client in clients]
    assert [sum(column) for column in zip(*logged, strict=True)] == [row.uplink_bytes for row in rows[1:]]
    total = format_bytes(2 * messages + attached)
    assert totals(rows)[0]["sent"] == total
    assert f"uplink in total: {total}" in render_status(clients[0].participation.mailbox)


def test_one_that_is_too_large_to_be_read_counts_whole(tmp_path, caplog):
    sizes = {"a": 10, "b": 2 * MAX_BYTES}
    mailbox = found(tmp_path, **SHARED)
    record, rows, _ = run(mailbox, sizes)
    assert "The attachment of client b is left out" in caplog.text
    assert record.attached_bytes == on_the_wire(mailbox, "ab") > sum(sizes.values())
    assert rows[2].uplink_bytes > sum(sizes.values())


def test_those_of_clients_whose_updates_are_not_used_count(tmp_path):
    mailbox = found_enrolled(tmp_path, "abcd", min_clients=2, **SHARED)
    mailbox.post_attachment("c", SALIENCY_FILE, bytes(3000))
    mailbox.post_update(1, "c", b"rubbish")
    mailbox.post_attachment("d", SALIENCY_FILE, bytes(40_000))  # whose update never comes
    record, _, _ = run(mailbox, {"a": 10, "b": 200})
    assert [[entry.client_id for entry in entries] for entries in (record.accepted, record.refused)] == [
        ["a", "b"],
        ["c"],
    ]
    assert record.attached_bytes == 43_000 + on_the_wire(mailbox, "ab")
    assert mailbox.read_root(SALIENCY_FILE) == bytes(210)


def test_a_last_round_made_by_a_rollback_counts_them(tmp_path):
    mailbox = found(tmp_path, **SHARED)
    clients = [Sharing(mailbox, name, bytes(100)) for name in "ab"]
    coordinator = Coordinator(mailbox, saliency=join)
    run_rounds(coordinator, clients, 1)
    for client in clients:
        client.step()
    record = coordinator.rollback(0)
    assert (record.finished, record.attached_bytes) == (True, on_the_wire(mailbox, "ab"))


def test_a_federation_that_does_not_ask_looks_for_none(tmp_path):
    mailbox = found(tmp_path, rounds=2)
    mailbox.post_attachment("a", SALIENCY_FILE, bytes(100))
    assert run(mailbox, {"a": 1, "b": 1})[0].attached_bytes == 0


def test_a_link_or_a_folder_in_an_attachment_s_place_was_not_sent(tmp_path):
    mailbox = found(tmp_path / "box", **SHARED)
    (tmp_path / "elsewhere").write_bytes(bytes(5000))
    for name in "ab":
        (tmp_path / "box/attachments" / name).mkdir(parents=True)
    (tmp_path / "box/attachments/a" / SALIENCY_FILE).symlink_to(tmp_path / "elsewhere")
    (tmp_path / "box/attachments/b" / SALIENCY_FILE).mkdir()
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / SALIENCY_FILE).write_bytes(bytes(5000))
    (tmp_path / "box/attachments/d").symlink_to(tmp_path / "outside")
    assert [mailbox.attachment_bytes(name, SALIENCY_FILE) for name in ("a", "b", "c", "d")] == [0, 0, 0, 0]


def test_the_record_is_read_back_with_them(tmp_path):
    mailbox = found(tmp_path, **SHARED)
    record, _, _ = run(mailbox, {"a": 1, "b": 2})
    assert RoundRecord.from_json(record.to_json()).attached_bytes == on_the_wire(mailbox, "ab")
