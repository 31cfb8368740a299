from card_inputs import make_history

from fedfstq_hf.reporting.card.measurements import Measurement, finite, main_metric, newest, series


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
