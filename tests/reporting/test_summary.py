import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from metric_rows import make_rows

from fedfstq_hf.errors import DataError
from fedfstq_hf.reporting.comparison.summary import (
    TargetRule,
    reached_at,
    read_rows,
    summarize,
    target_value,
    write_summary,
)

# fedavg improves from 4.0 to 3.0: its target is 3.1, met in rounds 3 and 4.
FEDAVG = [4.0, 3.5, 3.2, 3.05, 3.0]


def test_target_is_a_share_of_the_references_own_improvement():
    rule = TargetRule()
    assert target_value(make_rows("fedavg", FEDAVG), rule, higher_is_better=False) == pytest.approx(3.1)
    # Exact match from 0.1 to 0.9: 0.1 + 0.9 * 0.8.
    assert target_value(make_rows("fedavg", [0.1, 0.9]), rule, higher_is_better=True) == pytest.approx(0.82)


@pytest.mark.parametrize("metrics", [[4.0, 4.0], [4.0, 3.0, 4.5], [4.0, math.nan], [4.0, None], [4.0]])
def test_no_improvement_means_no_target(metrics):
    assert target_value(make_rows("fedavg", metrics), TargetRule(), higher_is_better=False) is None


@pytest.mark.parametrize(
    ("metrics", "round_reached"),
    [
        ([4.0, 3.0, 3.2, 3.05, 3.0], 3),  # one good evaluation alone does not count
        ([4.0, 3.1, 3.1, 3.2, 3.2], 1),  # the first of the two counts, the target itself included
        ([4.0, 3.2, 3.2, 3.2, 3.0], None),  # the last evaluation has nothing to confirm it
        ([4.0, 3.0, 3.2, 3.0, 3.2], None),
        ([3.0, 3.0, 3.2, 3.2, 3.2], None),  # round 0 is before training
        ([4.0, 3.0, math.nan, 3.0, 3.0], 3),
        ([4.0, 3.0, None, 3.0, 3.0], 3),
    ],
)
def test_target_is_reached_at_the_first_of_two_evaluations_that_hold_it(metrics, round_reached):
    row = reached_at(make_rows("fstq", metrics), 3.1, TargetRule(), higher_is_better=False)
    assert (row and row["round"]) == round_reached


def test_higher_is_better_turns_the_rule_around():
    rows = make_rows("fstq", [0.1, 0.85, 0.7, 0.82, 0.9])
    assert reached_at(rows, 0.82, TargetRule(), higher_is_better=True)["round"] == 3
    assert reached_at(rows, 0.82, TargetRule(consecutive=1), higher_is_better=True)["round"] == 1
    assert reached_at(rows, 0.82, TargetRule(consecutive=3), higher_is_better=True) is None


@given(st.lists(st.floats(0, 5), min_size=1, max_size=15), st.floats(0, 5), st.integers(1, 4))
def test_reaching_agrees_with_a_plain_search(metrics, target, consecutive):
    row = reached_at(make_rows("m", metrics), target, TargetRule(consecutive=consecutive), higher_is_better=False)
    windows = [
        start
        for start in range(1, len(metrics) - consecutive + 1)
        if all(value <= target for value in metrics[start : start + consecutive])
    ]
    assert (row and row["round"]) == (windows[0] if windows else None)


def test_summary_of_two_seeds_by_hand():
    rows = [
        *make_rows("fedavg", FEDAVG, seed=0, bytes_per_round=1000),  # reached in round 3: 3000 bytes, 6 s
        *make_rows("fstq", [4.0, 3.6, 3.1, 3.1, 3.1], seed=0, bytes_per_round=20),  # round 2: 40 bytes, 4 s
        *make_rows("fedavg", FEDAVG, seed=1, bytes_per_round=1000),
        *make_rows("fstq", [4.0, 3.6, 3.2, 3.1, 3.08], seed=1, bytes_per_round=20),  # round 3: 60 bytes, 6 s
    ]
    summary = summarize(rows, metric="eval_loss", higher_is_better=False)
    assert summary["metric"] == "eval_loss"
    assert summary["higher_is_better"] is False
    assert summary["seeds"] == [0, 1]
    assert summary["target"] == pytest.approx(3.1)
    assert "90 %" in summary["target_rule"]
    assert "2 consecutive" in summary["target_rule"]
    assert summary["methods"]["fstq"] == {
        "rounds": 4,
        "final_metric": pytest.approx(3.09),
        "uplink_bytes": 80,
        "downlink_bytes": 4000,
        "uplink_bytes_to_target": 50,
        "total_bytes_to_target": 2550,
        "seconds_to_target": {"lte-20mbps": 5.0, "straggler-tail": 15.0},
    }
    assert summary["per_seed"]["1"]["methods"]["fstq"]["uplink_bytes_to_target"] == 60
    assert summary["per_seed"]["0"]["ratios"] == {
        "uplink_to_target": 75.0,
        "total_to_target": 6000 / 2040,
        "time_to_target": {"lte-20mbps": 1.5, "straggler-tail": 1.5},
    }
    # Mean of the seeds' ratios 75 and 50; sample standard deviation of (75, 50) and of (40, 60).
    assert summary["ratios"]["uplink_to_target"] == pytest.approx(62.5)
    assert summary["ratios"]["time_to_target"]["straggler-tail"] == pytest.approx(1.25)
    assert summary["spread"]["ratios"]["uplink_to_target"] == pytest.approx(25 / math.sqrt(2))
    assert summary["spread"]["methods"]["fstq"]["uplink_bytes_to_target"] == pytest.approx(20 / math.sqrt(2))
    assert summary["spread"]["methods"]["fedavg"]["uplink_bytes"] == 0


def test_a_seed_that_misses_makes_the_mean_null():
    rows = [
        *make_rows("fedavg", FEDAVG, seed=0),
        *make_rows("fstq", FEDAVG, seed=0),
        *make_rows("fedavg", FEDAVG, seed=1),
        *make_rows("fstq", [4.0, 3.9, 3.8, 3.7, 3.6], seed=1),
    ]
    summary = summarize(rows, metric="eval_loss", higher_is_better=False)
    assert summary["methods"]["fstq"]["uplink_bytes_to_target"] is None
    assert summary["methods"]["fstq"]["seconds_to_target"] == {"lte-20mbps": None, "straggler-tail": None}
    assert summary["ratios"] == {
        "uplink_to_target": None,
        "total_to_target": None,
        "time_to_target": {"lte-20mbps": None, "straggler-tail": None},
    }
    assert summary["per_seed"]["0"]["ratios"]["uplink_to_target"] == 1.0
    assert summary["methods"]["fstq"]["final_metric"] == pytest.approx(3.3)


def test_one_seed_has_no_spread_and_whole_numbers_stay_whole():
    summary = summarize(make_rows("fedavg", FEDAVG), metric="eval_loss", higher_is_better=False)
    assert summary["spread"]["methods"]["fedavg"]["final_metric"] is None
    assert isinstance(summary["methods"]["fedavg"]["uplink_bytes"], int)
    assert summary["ratios"]["uplink_to_target"] is None  # fstq was not run


def test_without_the_reference_there_is_no_target():
    summary = summarize(make_rows("fstq", FEDAVG), metric="eval_loss", higher_is_better=False)
    assert summary["target"] is None
    assert summary["methods"]["fstq"]["uplink_bytes_to_target"] is None


def test_rows_may_come_in_any_order():
    rows = [*make_rows("fedavg", FEDAVG), *make_rows("fstq", FEDAVG)]
    ordered = summarize(rows, metric="eval_loss", higher_is_better=False)
    assert summarize(rows[::-1], metric="eval_loss", higher_is_better=False) == ordered


def test_incomplete_runs_are_refused():
    rows = make_rows("fedavg", FEDAVG)
    for broken in (rows[:2] + rows[3:], [*rows, rows[2]]):
        with pytest.raises(DataError, match="--resume"):
            summarize(broken, metric="eval_loss", higher_is_better=False)
    with pytest.raises(DataError, match=r"fstq has no rows for seeds \[1\]"):
        summarize(
            [*rows, *make_rows("fedavg", FEDAVG, seed=1), *make_rows("fstq", FEDAVG)],
            metric="eval_loss",
            higher_is_better=False,
        )
    with pytest.raises(DataError, match="no metric rows"):
        summarize([], metric="eval_loss", higher_is_better=False)


def test_files_round_trip_and_forgive_a_torn_last_line(tmp_path):
    rows = make_rows("fedavg", FEDAVG)
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + '\n{"method": "fed')
    assert read_rows(path) == rows
    path.write_text("\n".join([lines[0], '{"method": "fed', lines[1]]))
    with pytest.raises(DataError, match="line 2"):
        read_rows(path)
    summary = summarize(rows, metric="eval_loss", higher_is_better=False)
    write_summary(tmp_path / "summary.json", summary)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert sorted(item.name for item in tmp_path.iterdir()) == ["metrics.jsonl", "summary.json"]
