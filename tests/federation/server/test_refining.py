"""Two messages a round: what previews say now and refinements a round later, in numbers, and what is not used."""

import hashlib

import pytest
import torch
from light import SCHEMA, run_rounds
from light_refining import (
    PREVIEW,
    REFINEMENT,
    RefiningClient,
    S,
    close,
    federation,
    previews,
    refinements,
    second_round,
    write,
)
from light_updates import SIZE

from fedfstq_hf.codec import CodecContext, get_codec, message
from fedfstq_hf.federation import adapter_file, control, history
from fedfstq_hf.federation.client.session import Caps
from fedfstq_hf.federation.control import Enrolment
from fedfstq_hf.federation.record import RoundRecord
from fedfstq_hf.federation.server.coordinator import Coordinator

# In numbers


def test_a_round_takes_half_of_its_previews_and_the_next_one_puts_the_refinements_in_their_place(tmp_path):
    mailbox = federation(tmp_path, rounds=3)
    coordinator = Coordinator(mailbox)
    previews(mailbox, 0, a=2, b=4)  # P = (2 + 3 * 4) / 4 = 3.5
    assert close(coordinator) == 1.75
    refinements(mailbox, 0, a=1, b=5)  # R = 4
    previews(mailbox, 1, a=-2, b=2)  # P = 1
    assert close(coordinator) == 1.75 + 0.5 + (4 - 1.75)
    refinements(mailbox, 1, a=0, b=4)  # R = 3
    previews(mailbox, 2, a=8, b=4)  # the last round: 5, in full
    assert close(coordinator) == 4.5 + 5 + (3 - 0.5)
    assert coordinator.finished


def test_the_record_names_both_with_their_weights_and_bytes(tmp_path):
    mailbox, coordinator = second_round(tmp_path)
    refinements(mailbox, 0, a=1, b=5)
    close(coordinator)
    record = coordinator.record
    assert [(u.client_id, u.weight, u.num_examples, u.staleness) for u in record.refinements] == [
        ("a", 0.25, 1, 0),
        ("b", 0.75, 3, 0),
    ]
    sizes = [ref.num_bytes for ref in (*mailbox.list_updates(1), *mailbox.list_updates(0, refinements=True))]
    assert record.uplink_bytes == sum(sizes)
    row = history.load(mailbox.read_root("history.jsonl"))[2]
    assert (row.uplink_bytes, row.accepted, row.refused, row.late) == (sum(sizes), 2, 0, 0)
    assert row.dense_uplink_bytes == 2 * record.adapter_bytes  # a refinement says again what its preview said


def test_with_a_whole_step_the_refinements_only_correct(tmp_path):
    mailbox = federation(tmp_path, preview_step=1.0)
    coordinator = Coordinator(mailbox)
    previews(mailbox, 0, a=2, b=4)
    assert close(coordinator) == 3.5
    refinements(mailbox, 0, a=1, b=5)
    previews(mailbox, 1, a=0, b=0)
    assert close(coordinator) == 4


def test_the_server_optimizer_steps_along_both_together(tmp_path):
    mailbox = federation(tmp_path, server={"optimizer": "SGD", "lr": 0.5, "momentum": 0.5})
    coordinator = Coordinator(mailbox)
    previews(mailbox, 0, a=2, b=4)
    assert close(coordinator) == 0.5 * 1.75
    refinements(mailbox, 0, a=1, b=5)
    previews(mailbox, 1, a=0, b=0)
    assert close(coordinator) == 0.5 * 1.75 + 0.5 * (0.5 * 1.75 + (4 - 1.75))


def test_what_a_clipped_preview_said_is_taken_back_as_it_was_clipped(tmp_path):
    mailbox = federation(tmp_path, clip=2.0, weights="uniform")
    coordinator = Coordinator(mailbox)
    previews(mailbox, 0, a=1, b=1, c=10)  # c counts as 2: P = 4 / 3
    assert close(coordinator) == pytest.approx(2 / 3)
    assert coordinator.record.accepted[2].scale == pytest.approx(0.2)
    refinements(mailbox, 0, a=1, b=1, c=1)
    previews(mailbox, 1, a=0, b=0)
    assert close(coordinator) == pytest.approx(1)


@pytest.mark.parametrize(
    ("codec", "sizes", "cap"),
    [
        ("fp32", (None, None), None),
        ("topk", (PREVIEW, REFINEMENT), None),
        ("fstq", (PREVIEW, PREVIEW), 275),
        ("paper", (300, REFINEMENT), None),
    ],
)
def test_real_clients_messages_give_the_adapter_that_the_formula_says(tmp_path, codec, sizes, cap):
    mailbox = federation(tmp_path, codec=codec, rounds=3, weights="precision")
    coordinator = Coordinator(mailbox)
    members = [RefiningClient(mailbox, name, None, preview=sizes[0], refinement=sizes[1]) for name in "ab"]
    for client in members:
        client.session._caps = Caps(cap)
    run_rounds(coordinator, members)

    def mean(entries, round, refinement):
        refs = {ref.client_id: ref for ref in mailbox.list_updates(round, refinements=refinement)}
        total = torch.zeros(SIZE, dtype=torch.float64)
        for entry in entries:
            data = mailbox.read_update(refs[entry.client_id], max_bytes=9999)
            assert hashlib.sha256(data).hexdigest() == entry.sha256
            payload = message.unpack(data)[1]
            update = get_codec(codec).decode(payload, SCHEMA, CodecContext(round=round)).to_dense()
            total += entry.weight * entry.scale * update
        return total

    records = [RoundRecord.from_json(mailbox.read(round, "round.json")) for round in range(4)]
    assert [(len(record.accepted), len(record.refinements)) for record in records] == [(0, 0), (2, 0), (2, 2), (2, 2)]
    assert mailbox.list_updates(2, refinements=True) == []
    assert records[3].finished
    p = [mean(record.accepted, round, False) for round, record in enumerate(records[1:])]
    r = [mean(record.refinements, round, True) for round, record in enumerate(records[2:])]
    expected = torch.zeros(SIZE, dtype=torch.float64)
    for round, step in enumerate((S * p[0], S * p[1] + r[0] - S * p[0], p[2] + r[1] - S * p[1]), start=1):
        expected = expected + step
        state = adapter_file.load(mailbox.read(round, "adapter_model.safetensors"))
        assert torch.allclose(SCHEMA.flatten(state).double(), expected, atol=1e-6)
    assert torch.equal(r[0], p[0]) == (codec == "fp32")


# What did not arrive


def test_of_a_client_without_a_refinement_the_preview_counts_in_full(tmp_path):
    mailbox, coordinator = second_round(tmp_path)
    refinements(mailbox, 0, a=6)  # with b's preview: (6 + 3 * 4) / 4 = 4.5
    assert close(coordinator) == 4.5
    assert [(u.client_id, u.weight) for u in coordinator.record.refinements] == [("a", 0.25)]


def test_without_any_refinement_the_previews_count_in_full(tmp_path):
    _, coordinator = second_round(tmp_path)
    assert close(coordinator) == 3.5
    assert coordinator.record.refinements == ()


def test_of_a_client_whose_preview_never_arrived_the_refinement_is_used(tmp_path):
    mailbox, coordinator = second_round(tmp_path)
    refinements(mailbox, 0, a=2, b=4, c=9)  # (2 + 3 * 4 + 9) / 5 = 4.6
    assert close(coordinator) == pytest.approx(4.6)
    assert [u.client_id for u in coordinator.record.refinements] == ["a", "b", "c"]
    assert coordinator.record.late == ()


def test_of_a_client_whose_preview_was_refused_the_refinement_is_used(tmp_path):
    mailbox = federation(tmp_path)
    coordinator = Coordinator(mailbox)
    mailbox.post_update(0, "c", write(mailbox, "c", 9, 0)[:-1] + b"x")
    previews(mailbox, 0, a=2, b=4)
    assert close(coordinator) == 1.75
    assert [u.client_id for u in coordinator.record.refused] == ["c"]
    previews(mailbox, 1, a=0, b=0)
    refinements(mailbox, 0, c=9)  # (2 + 3 * 4 + 9) / 5
    assert close(coordinator) == pytest.approx(4.6)
    assert coordinator.record.refused == ()


def test_one_that_arrives_after_the_next_round_was_closed_is_late_once(tmp_path):
    mailbox, coordinator = second_round(tmp_path)
    late = write(mailbox, "b", 100, 0, refinement=True)
    assert close(coordinator) == 3.5
    mailbox.post_update(0, "b", late, refinement=True)
    records = []
    for round in (2, 3):
        previews(mailbox, round, a=0, b=0)
        assert close(coordinator) == 3.5
        records.append(coordinator.record)
    (entry,) = records[0].late
    assert (entry.client_id, entry.round, entry.refinement) == ("b", 0, True)
    assert (entry.num_bytes, entry.sha256) == (len(late), hashlib.sha256(late).hexdigest())
    assert entry.reason == "It arrived after round 1 was closed."
    assert records[1].late == ()
    assert records[0].uplink_bytes - records[1].uplink_bytes == len(late)
    row = history.load(mailbox.read_root("history.jsonl"))[3]
    assert (row.uplink_bytes, row.late, row.refinements_unused) == (records[0].uplink_bytes, 0, 1)
    assert row.dense_uplink_bytes == 2 * records[0].adapter_bytes


# What is refused


def refused_refinement(path, data):
    """The entry of what is posted as b's refinement; its preview stands in."""
    mailbox, coordinator = second_round(path)
    mailbox.post_update(0, "b", data(mailbox), refinement=True)
    refinements(mailbox, 0, a=6)
    assert close(coordinator) == 4.5
    (entry,) = coordinator.record.refused
    assert (entry.client_id, entry.round, entry.refinement) == ("b", 0, True)
    assert [u.client_id for u in coordinator.record.refinements] == ["a"]
    previews(mailbox, 2, a=0, b=0)
    assert close(coordinator) == 4.5
    assert (coordinator.record.refused, coordinator.record.late) == ((), ())  # it is counted once
    row = history.load(mailbox.read_root("history.jsonl"))[2]
    dense = 2 * coordinator.record.adapter_bytes
    assert (row.refused, row.refinements_unused, row.dense_uplink_bytes) == (0, 1, dense)
    return entry


def test_a_damaged_refinement_is_refused_and_the_preview_stands_in(tmp_path):
    entry = refused_refinement(tmp_path, lambda mailbox: write(mailbox, "b", 9, 0, refinement=True)[:-1] + b"x")
    assert entry.reason.startswith("message digest does not match header and payload")
    assert entry.sha256 != ""


NO_REFINEMENT = "It is a first message, and lies where the round's refinement was expected."
NO_PREVIEW = "It is a refinement, and lies where the round's first message was expected."


def test_a_preview_posted_as_a_refinement_is_refused(tmp_path):
    assert refused_refinement(tmp_path, lambda mailbox: write(mailbox, "b", 4, 0)).reason == NO_REFINEMENT


def test_a_refinement_of_another_round_is_refused(tmp_path):
    entry = refused_refinement(tmp_path, lambda mailbox: write(mailbox, "b", 9, 1, refinement=True))
    assert entry.reason == "It names round 1; expected 0."


def test_a_refinement_that_is_too_large_is_refused_unread(tmp_path):
    entry = refused_refinement(tmp_path, lambda mailbox: bytes(5000))
    assert (entry.sha256, entry.num_bytes) == ("", 5000)


def test_a_refinement_posted_as_a_preview_is_refused(tmp_path):
    mailbox = federation(tmp_path)
    mailbox.post_update(0, "c", write(mailbox, "c", 100, 0, refinement=True))
    previews(mailbox, 0, a=2, b=4)
    coordinator = Coordinator(mailbox)
    assert close(coordinator) == 1.75
    assert [(u.client_id, u.reason, u.refinement) for u in coordinator.record.refused] == [("c", NO_PREVIEW, False)]


def test_of_clients_that_were_not_selected_or_are_not_enrolled_none_is_used(tmp_path):
    enrolled = {name: Enrolment() for name in "abcd"}
    mailbox = federation(tmp_path, enrolled=enrolled, clients_per_round=2, weights="uniform")
    coordinator = Coordinator(mailbox)
    chosen = coordinator.record.selected
    previews(mailbox, 0, **dict.fromkeys(chosen, 2))
    assert close(coordinator) == 1
    uninvited = min(set(enrolled) - set(chosen))
    refinements(mailbox, 0, z=100, **dict.fromkeys([*chosen, uninvited], 3))
    previews(mailbox, 1, **dict.fromkeys(coordinator.record.selected, 0))
    assert close(coordinator) == 3
    assert [(u.client_id, u.reason) for u in coordinator.record.refused] == [
        (uninvited, f"Client {uninvited} was not selected for this round.")
    ]


# Previews that cannot be taken back


def replaced(mailbox, path):
    path.write_bytes(write(mailbox, "b", 100, 0))


def damaged(mailbox, path):
    path.write_bytes(b"x")


def too_large(mailbox, path):
    path.write_bytes(bytes(5000))


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda mailbox, path: path.unlink(), "Its preview is no longer in the mailbox."),
        (replaced, "Its preview is not the one that was used."),
        (damaged, "Its preview is not the one that was used."),
        (too_large, "It has 5000 bytes; at most 4096 are taken."),
    ],
    ids=["gone", "replaced", "damaged", "too large"],
)
def test_where_a_preview_cannot_be_read_again_what_it_said_stays(tmp_path, caplog, spoil, why):
    mailbox, coordinator = second_round(tmp_path)
    refinements(mailbox, 0, a=1, b=5)
    spoil(mailbox, tmp_path / "updates/000000/b.safetensors")
    # b's half of 0.75 * 4 stays, and stands for 0.375 of the mean; a's refinement, 1, makes up the rest
    assert close(coordinator) == 1.5 + 0.625
    assert [(u.client_id, u.weight) for u in coordinator.record.refinements] == [("a", 1.0)]
    assert coordinator.record.refused == ()
    assert [entry.getMessage() for entry in caplog.records] == [
        f"The refinement of client b for round 0 is not used: {why}"
    ]


def test_where_no_preview_can_be_read_again_all_of_them_stay(tmp_path):
    mailbox, coordinator = second_round(tmp_path)
    refinements(mailbox, 0, a=1, b=5)
    for name in "ab":
        (tmp_path / f"updates/000000/{name}.safetensors").unlink()
    assert close(coordinator) == 1.75
    assert coordinator.record.refinements == ()


def test_the_refinement_of_a_client_that_was_dismissed_meanwhile_is_not_used(tmp_path):
    mailbox, coordinator = second_round(tmp_path, enrolled={name: Enrolment() for name in "abc"})
    refinements(mailbox, 0, a=1, b=5)
    control.change_control(mailbox, control.dismiss(["b"]))
    previews(mailbox, 1, c=0)
    assert close(coordinator) == 1.5 + 0.625
    assert [u.client_id for u in coordinator.record.refinements] == ["a"]


# Where all clients say the same, the rounds end there, whatever was lost


def dismissed(mailbox, name):
    control.change_control(mailbox, control.dismiss([name]))


def deleted(mailbox, name):
    (mailbox.path / f"updates/000000/{name}.safetensors").unlink()


def written_over(mailbox, name):
    (mailbox.path / f"updates/000000/{name}.safetensors").write_bytes(write(mailbox, name, 100, 0))


@pytest.mark.parametrize(("step", "correction"), [(0.8, 0.6), (1.0, 1.0), (0.5, 1.0), (0.3, 0.0)])
@pytest.mark.parametrize("lose", [dismissed, deleted, written_over])
@pytest.mark.parametrize("lost", ["d", "bd", "abd"])
def test_a_lost_preview_counts_once(tmp_path, step, correction, lose, lost):
    mailbox = federation(
        tmp_path,
        enrolled={name: Enrolment() for name in "abcd"},
        preview_step=step,
        preview_correction=correction,
        min_clients=1,
    )
    coordinator = Coordinator(mailbox)
    previews(mailbox, 0, **dict.fromkeys("abcd", 1))
    assert close(coordinator) == pytest.approx(step)
    refinements(mailbox, 0, **dict.fromkeys("abcd", 1))
    for name in lost:
        lose(mailbox, name)
    previews(mailbox, 1, c=0)
    assert close(coordinator) == pytest.approx(1)
    assert {u.client_id for u in coordinator.record.refinements} == set("abcd") - set(lost)


@pytest.mark.parametrize(("step", "correction"), [(0.8, 0.6), (1.0, 1.0), (0.5, 1.0)])
@pytest.mark.parametrize("weights", ["uniform", "examples", "precision"])
def test_a_lost_preview_counts_once_beside_missing_and_refused_refinements(tmp_path, step, correction, weights):
    mailbox = federation(tmp_path, preview_step=step, preview_correction=correction, weights=weights, clip=2.0)
    coordinator = Coordinator(mailbox)
    previews(mailbox, 0, **dict.fromkeys("abcd", 1))
    assert close(coordinator) == pytest.approx(step)
    refinements(mailbox, 0, a=1, e=1)  # b's is refused, c sent none, and of e only the refinement came through
    mailbox.post_update(0, "b", write(mailbox, "b", 9, 0, refinement=True)[:-1] + b"x", refinement=True)
    deleted(mailbox, "d")
    previews(mailbox, 1, a=0, c=0)
    assert close(coordinator) == pytest.approx(1)
    assert [u.client_id for u in coordinator.record.refused] == ["b"]
    assert [u.client_id for u in coordinator.record.refinements] == ["a", "e"]


def test_what_a_clipped_and_lost_preview_said_stays_as_it_was_clipped(tmp_path):
    mailbox = federation(tmp_path, clip=2.0, weights="uniform")
    coordinator = Coordinator(mailbox)
    previews(mailbox, 0, a=1, b=1, c=10)  # c counts as 2
    assert close(coordinator) == pytest.approx(2 / 3)
    deleted(mailbox, "c")
    previews(mailbox, 1, a=0, b=0)
    assert close(coordinator) == pytest.approx(0.5 * 2 / 3 + (1 - 0.5 / 3) * 1)
