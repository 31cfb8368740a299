"""The root's files: a history that is made again where it is damaged or lags, and a card from the facts of a round."""

import json

import pytest
from light import LightClient, found, run_rounds
from light_updates import ones, post

from fedfstq_hf.federation import history
from fedfstq_hf.federation.record import RoundRecord
from fedfstq_hf.federation.server.coordinator import Coordinator


def rows(path):
    return history.load((path / "history.jsonl").read_bytes())


def three_rounds(path):
    mailbox = found(path, rounds=6)
    coordinator = Coordinator(mailbox)
    post(mailbox, "bad", ones(1), base="0" * 64)
    run_rounds(coordinator, [LightClient(mailbox, name, path / name) for name in "ab"], 3)
    return mailbox, coordinator


def test_a_row_for_each_round(tmp_path):
    mailbox, _ = three_rounds(tmp_path)
    records = [RoundRecord.from_json(mailbox.read(round, "round.json")) for round in range(4)]
    expected = [history.row(record, records[place - 1] if place else None) for place, record in enumerate(records)]
    assert rows(tmp_path) == expected
    assert [(row.accepted, row.refused) for row in rows(tmp_path)] == [(0, 0), (2, 1), (2, 0), (2, 0)]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda lines: b"",
        lambda lines: b"not json\n",
        lambda lines: b"\xff\xfe",
        lambda lines: b"".join(lines[:2]),  # as a coordinator leaves it that was killed before it renewed the root
        lambda lines: b"".join(lines[:2])[:-9],
        lambda lines: b"".join([*lines[:1], *lines[2:]]),
        lambda lines: b"".join(lines) + lines[-1].replace(b'"round":3', b'"round":9'),
        None,
    ],
    ids=["empty", "foreign", "binary", "lags", "torn", "a gap", "ahead", "missing"],
)
def test_a_damaged_history_is_made_again(tmp_path, spoil):
    mailbox, _ = three_rounds(tmp_path)
    path = tmp_path / "history.jsonl"
    whole = path.read_bytes()
    path.unlink() if spoil is None else path.write_bytes(spoil(whole.splitlines(keepends=True)))
    coordinator = Coordinator(mailbox)
    assert path.read_bytes() == whole
    for name in "cd":
        post(mailbox, name, ones(1), round=3)
    coordinator.close_round()
    assert [row.round for row in rows(tmp_path)] == [0, 1, 2, 3, 4]
    assert path.read_bytes().startswith(whole)


def test_two_coordinators_leave_one_history(tmp_path):
    mailbox, one = three_rounds(tmp_path)
    two = Coordinator(mailbox)
    for round, coordinator in ((3, one), (4, two)):
        for name in "cd":
            post(mailbox, name, ones(1), round=round)
        coordinator.close_round()
    one.close_round()  # learns of round 5
    assert [row.round for row in rows(tmp_path)] == [0, 1, 2, 3, 4, 5]


# The card


def make_card(facts):
    text = {
        "round": facts.record.round,
        "rows": len(facts.history),
        "config": facts.adapter_config,
        "metrics": {str(round): dict(metrics) for round, metrics in facts.metrics.items()},
        "was": json.loads(facts.existing_card)["round"] if facts.existing_card else None,
    }
    return {"README.md": json.dumps(text).encode()}


def card(path):
    return json.loads((path / "README.md").read_bytes())


def test_a_card_follows_the_rounds_and_knows_what_stood_there(tmp_path):
    mailbox = found(tmp_path, rounds=6)
    coordinator = Coordinator(mailbox, card=make_card)
    assert card(tmp_path) == {"round": 0, "rows": 1, "config": {}, "metrics": {}, "was": None}
    for name in "ab":
        post(mailbox, name, ones(1))
    coordinator.close_round()
    assert card(tmp_path) == {"round": 1, "rows": 2, "config": {}, "metrics": {}, "was": 0}


def test_a_posted_metric_reaches_the_card(tmp_path):
    mailbox = found(tmp_path)
    coordinator = Coordinator(mailbox, card=make_card)
    mailbox.post_metric(0, "held-out", {"eval_loss": 2.5})
    coordinator.refresh()
    assert card(tmp_path)["metrics"] == {"0": {"held-out": {"eval_loss": 2.5}}}


def test_a_coordinator_that_lost_leaves_the_winner_s_card(tmp_path):
    mailbox = found(tmp_path)
    one, two = Coordinator(mailbox, card=make_card), Coordinator(mailbox, card=make_card)
    for name in "ab":
        post(mailbox, name, ones(1))
    one.close_round()
    two.close_round()
    assert (card(tmp_path)["round"], card(tmp_path)["rows"]) == (1, 2)


def test_what_people_put_beside_it_stays(tmp_path):
    mailbox = found(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    coordinator = Coordinator(mailbox, card=make_card)
    for name in "ab":
        post(mailbox, name, ones(1))
    coordinator.close_round()
    assert (tmp_path / "notes.txt").read_text() == "mine"
