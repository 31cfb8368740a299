from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedfstq_hf.errors import MailboxError
from fedfstq_hf.federation import history
from fedfstq_hf.federation.history import HistoryRow, reason_class
from fedfstq_hf.federation.record import AcceptedUpdate, Frame, RefusedUpdate, RoundRecord

COUNT = st.integers(0, 2**53)
ROW = st.builds(
    HistoryRow,
    round=st.just(0),
    opened_at=st.floats(allow_nan=False, allow_infinity=False),
    num_examples=COUNT,
    uplink_bytes=COUNT,
    dense_uplink_bytes=COUNT,
    downlink_bytes=COUNT,
    dense_downlink_bytes=COUNT,
    accepted=COUNT,
    refused=COUNT,
    late=COUNT,
    reasons=st.dictionaries(st.from_regex(r"[A-Za-z][A-Za-z ,.'-]{0,59}", fullmatch=True), COUNT, max_size=3),
    restored_from=st.none() | COUNT,
    clipped=COUNT,
    refinements_unused=COUNT,
)


def record(round: int, *, accepted: int = 0, reasons: tuple[str, ...] = (), **changes: object) -> RoundRecord:
    fields: dict[str, object] = {
        "round": round,
        "adapter_sha256": "a" * 64,
        "adapter_digest": "d" * 64,
        "adapter_bytes": 1000,
        "schema": "b" * 64,
        "opened_at": 10.0 * round,
        "deadline": None,
        "finished": False,
        "accepted": tuple(AcceptedUpdate(f"c{i}", "d" * 64, 50 + i, 7, 1 / accepted, 0.5) for i in range(accepted)),
        "refused": tuple(RefusedUpdate(f"r{i}", "", 30, reason) for i, reason in enumerate(reasons)),
    }
    return RoundRecord(**(fields | changes))


def test_the_first_round_costs_its_adapter():
    assert history.row(record(0), None) == HistoryRow(0, 0.0, 0, 0, 0, 1000, 1000)


def test_a_round_counts_all_that_arrived():
    reasons = ("It has 5000 bytes; this federation takes at most 4096.",) * 2 + ("It names client eve; expected bob.",)
    made = history.row(
        record(3, accepted=2, reasons=reasons, frames=(Frame(3, "messages", 400),), adapter_bytes=1010),
        record(2, adapter_bytes=1000),
    )
    assert (made.accepted, made.refused, made.late) == (2, 3, 0)
    assert made.uplink_bytes == 50 + 51 + 3 * 30
    assert made.dense_uplink_bytes == 5 * 1000
    assert (made.downlink_bytes, made.dense_downlink_bytes) == (400, 1010)
    assert made.num_examples == 14
    assert made.reasons == {"not from the client it names": 1, "too large": 2}


def test_late_updates_cost_bytes_too():
    late = (RefusedUpdate("slow", "e" * 64, 60, "It arrived after round 1 was closed.", 1),)
    made = history.row(record(3, accepted=1, late=late), record(2))
    assert (made.late, made.refused, made.reasons) == (1, 0, {})
    assert (made.uplink_bytes, made.dense_uplink_bytes) == (50 + 60, 2000)


def test_refinements_that_were_not_used_are_no_updates_that_were_not_used():
    late = (
        RefusedUpdate("slow", "e" * 64, 60, "It arrived after round 1 was closed.", 1),
        RefusedUpdate("slow", "f" * 64, 600, "It arrived after round 1 was closed.", 1, refinement=True),
    )
    refused = (RefusedUpdate("odd", "0" * 64, 500, "It has 500 bytes; at most 400 are taken.", 2, refinement=True),)
    made = history.row(record(3, accepted=1, late=late, refused=refused), record(2))
    assert (made.accepted, made.refused, made.late, made.refinements_unused) == (1, 0, 1, 2)
    assert made.reasons == {}
    assert (made.uplink_bytes, made.dense_uplink_bytes) == (50 + 60 + 600 + 500, 2000)


def test_clipped_updates_are_counted():
    accepted = tuple(
        AcceptedUpdate(f"c{i}", "d" * 64, 50, 7, 0.5, 9.0, scale=scale) for i, scale in enumerate((1.0, 0.1))
    )
    assert history.row(dataclasses.replace(record(1), accepted=accepted), record(0)).clipped == 1


def test_a_rollback_to_the_first_round_is_kept():
    made = history.row(record(4, restored_from=0), record(3))
    assert history.load(history.dump([made]))[0].restored_from == 0


def test_without_a_packed_change_the_adapter_is_downloaded():
    assert history.row(record(1), record(0)).downlink_bytes == 1000


@pytest.mark.parametrize(("round", "previous"), [(2, 0), (2, 2), (2, None), (0, 0)])
def test_the_wrong_predecessor_is_refused(round, previous):
    with pytest.raises(MailboxError, match=f"row of round {round} needs"):
        history.row(record(round), None if previous is None else record(previous))


@given(st.lists(ROW, max_size=4))
def test_dump_and_load_are_inverse(rows):
    rows = [dataclasses.replace(row, round=number) for number, row in enumerate(rows)]
    data = history.dump(rows)
    assert history.load(data) == rows
    assert data.count(b"\n") == len(rows)


def test_a_row_is_short():
    made = history.row(
        record(999, accepted=100, frames=(Frame(999, "messages", 12345),), adapter_bytes=170_000_000), record(998)
    )
    assert len(history.dump([made])) < 250


def test_many_odd_reasons_stay_few():
    words = [f"reason {chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(100)]
    made = history.row(record(1, reasons=(*words, words[40], "other reasons")), record(0))
    assert len(made.reasons) <= 8
    assert made.reasons[words[40]] == 2
    assert sum(made.reasons.values()) == made.refused == 102


GOOD = json.loads(history.dump([HistoryRow(5, 0.0, 0, 0, 0, 1, 1)]))


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"nothing",
        b"[]",
        b"3",
        b"\xff",
        b"[" * 100_000,
        b"{}",
        json.dumps(GOOD | {"more": 1}).encode(),
        *(
            json.dumps(GOOD | {name: value}).encode()
            for name, value in [
                ("round", -1),
                ("round", True),
                ("round", "5"),
                ("round", 4),
                ("uplink_bytes", 1.5),
                ("uplink_bytes", None),
                ("opened_at", float("nan")),
                ("opened_at", "now"),
                ("reasons", ["too large"]),
                ("reasons", {"too large": "many"}),
                ("reasons", {"[too large](http://elsewhere)": 1}),
                ("reasons", {"": 1}),
                ("reasons", dict.fromkeys("abcdefghi", 1)),
                ("restored_from", -1),
            ]
        ),
    ],
    ids=repr,
)
def test_what_is_no_history_is_refused(line):
    good = history.dump([HistoryRow(4, 0.0, 0, 0, 0, 1, 1)])
    with pytest.raises(MailboxError, match="history"):
        history.load(good + line + b"\n")


def test_an_empty_history_has_no_rows():
    assert history.load(b"") == []


@pytest.mark.parametrize(
    ("reason", "name"),
    [
        ("It names base adapter abc; expected def.", "based on another adapter"),
        ("It names round 3; expected 4.", "for another round"),
        ("message has format version 7; this package reads version 1", "from another package version"),
        ("message digest does not match header and payload; the file is damaged or was altered", "damaged"),
        ("dense payload holds NaN or infinity; expected finite values", "not finite"),
        ("topk payload of 12 bytes announces a support of 99 bytes", "malformed"),
        ("It says that it was trained on 0 examples; expected at least 1.", "implausible number of examples"),
        ("Client c7 is not enrolled in this federation.", "not enrolled"),
        ("Client c7 was not selected for this round.", "not selected for the round"),
        ("It is not signed; client c7 is enrolled with a verify key.", "signature missing or wrong"),
        ("It is not sealed; this federation takes sealed messages only.", "sealing missing or wrong"),
        ("The moon was 40 % full, 0xdeadbeef; wait.", "The moon was full"),
        ("", "other reasons"),
        ("1234 ###", "other reasons"),
    ],
)
def test_reasons_are_classed_by_what_went_wrong(reason, name):
    assert reason_class(reason) == name


@given(st.text(max_size=1000))
def test_nothing_but_words_passes_from_a_reason(reason):
    name = reason_class(reason)
    assert 0 < len(name) <= 60
    assert all((char.isalpha() and char.isascii()) or char in " ,.'-" for char in name)


def test_quoted_values_do_not_pass():
    assert reason_class("unknown client 'x <script>evil</script> y', go away") == "unknown client go away"


def test_reasons_of_all_rows_come_most_frequent_first():
    rows = [
        HistoryRow(i, 0.0, 0, 0, 0, 1, 1, reasons=reasons) for i, reasons in enumerate([{"b": 1, "a": 2}, {"b": 4}])
    ]
    assert list(history.merge_reasons(rows).items()) == [("b", 5), ("a", 2)]
