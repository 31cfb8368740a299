import pytest
from card_inputs import make_history, make_metrics

from fedfstq_hf.federation.history import HistoryRow
from fedfstq_hf.reporting.card.facts import Measurement, finite, main_metric, newest, quality_vs_uplink, series


def test_only_finite_numbers_of_known_rounds_are_kept():
    odd = {"bad": float("nan"), "worse": float("inf"), "flag": True, "text": "3", "big": 10**400}
    posted = {"loss": 1, "nan": 2.0} | odd
    assert finite({2: {"b": posted, "": {"loss": 1.0}}, 1: {"a": {}}, 9: {"a": {"loss": 1.0}}}, up_to=3) == {
        2: {"b": {"loss": 1.0}}
    }


def test_the_held_out_loss_comes_first():
    assert main_metric({1: {"a": {"accuracy": 0.5}}, 2: {"b": {"eval_loss": 1.0}}}) == "eval_loss"
    assert main_metric({1: {"a": {"f1": 0.5, "accuracy": 0.5}}}) == "f1"
    assert main_metric({}) is None


def test_a_series_is_one_metric_by_source():
    metrics = {0: {"b": {"eval_loss": 3.0, "f1": 0.1}}, 2: {"b": {"eval_loss": 2.0}, "a": {"eval_loss": 4.0}}}
    assert series(metrics, "eval_loss") == {"a": {2: 4.0}, "b": {0: 3.0, 2: 2.0}}


def test_the_newest_value_of_each_source_counts():
    metrics = {0: {"a": {"x": 5.0}}, 1: {"a": {"x": 4.0}, "b": {"x": 9.0}}, 3: {"a": {"x": 2.0}}}
    assert newest(metrics, make_history(4), 4) == [
        Measurement("a", "x", 3, 2.0, 5.0),
        Measurement("b", "x", 1, 9.0, None),
    ]


def test_round_0_is_not_compared_with_itself():
    assert newest({0: {"a": {"x": 5.0}}}, make_history(0), 0) == [Measurement("a", "x", 0, 5.0, None)]


def test_what_a_rollback_undid_does_not_count():
    metrics = {round: {"a": {"x": float(round)}} for round in (1, 2, 3)}
    assert newest(metrics, make_history(5, restored_from=2), 5) == [Measurement("a", "x", 2, 2.0, None)]
    assert newest(metrics, make_history(4, restored_from=1), 4)[0].round == 1


def test_a_rollback_to_itself_ends():
    assert newest({1: {"a": {"x": 1.0}}}, make_history(3, restored_from=3), 3)[0].round == 1


def drawn(history, metrics):
    return {line.label: [(x, y) for x, y, _ in line.points] for line in quality_vs_uplink(history, metrics).lines}


def test_points_stand_over_the_bytes_sent_so_far():
    assert drawn(make_history(2), make_metrics(2)) == {"heldout": [(44_600, 3.58), (89_200, 3.54)]}
    assert [level.value for level in quality_vs_uplink(make_history(2), make_metrics(2)).levels] == [3.62]


def test_a_line_per_source_and_only_of_the_main_metric():
    metrics = {round: {"b": {"eval_loss": 1.0, "accuracy": 0.5}, "a": {"eval_loss": 2.0}} for round in (1, 2)}
    metrics[2]["c"] = {"accuracy": 0.5}
    lines = drawn(make_history(2), metrics)
    assert list(lines) == ["a", "b"]
    assert lines["b"] == [(44_600, 1.0), (89_200, 1.0)]
    assert quality_vs_uplink(make_history(2), metrics).levels == []


@pytest.mark.parametrize(
    ("history", "metrics"),
    [
        (make_history(3), {}),
        (make_history(3), {2: {"heldout": {"eval_loss": 3.0}}}),
        (make_history(0), make_metrics(0)),
        ([], make_metrics(3)),
        (make_history(3)[:1], make_metrics(3)),
        ([HistoryRow(round, 0.0, 0, 0, 0, 1, 1) for round in range(3)], make_metrics(2)),
    ],
    ids=["no metrics", "one round", "round 0", "no history", "history too short", "no bytes"],
)
def test_where_there_is_nothing_to_plot_there_is_no_plot(history, metrics):
    assert quality_vs_uplink(history, metrics) is None


def test_odd_names_and_values_are_drawn():
    metrics = {round: {f"$x^{i}$ \n" * 20: {"_$": 1e300 * round} for i in range(9)} for round in range(3)}
    assert quality_vs_uplink(make_history(2), metrics).png().startswith(b"\x89PNG")
