"""The `evaluate` modules: they load offline, in several processes at once, and without a writable home."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import evaluate
import pytest

from fedfstq_hf import metrics
from fedfstq_hf.errors import ConfigError
from fedfstq_hf.metrics.text_scores import rouge_l

PREDICTIONS = ["the cat sat", "a dog"]
REFERENCES = ["cat sat on", "dog"]
EXPECTED = {
    "exact_match": 0.5,
    "rouge_l": sum(rouge_l(*pair).fmeasure for pair in zip(PREDICTIONS, REFERENCES, strict=True)) / 2,
    "token_f1": 0.9,
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path / "metrics")
    monkeypatch.setattr("socket.socket.connect", _refuse)


def _refuse(*_: object) -> None:
    raise AssertionError("a metric must not reach for the network")


def _by_path(name: str) -> evaluate.Metric:
    return evaluate.load(metrics.SCRIPT, name)


@pytest.mark.parametrize("load", [metrics.load, _by_path])
@pytest.mark.parametrize("name", EXPECTED)
def test_text_metrics(load, name):
    metric = load(name)
    assert isinstance(metric, evaluate.Metric)
    assert metric.name == name
    assert metric.compute(predictions=PREDICTIONS, references=REFERENCES) == {name: pytest.approx(EXPECTED[name])}
    several = [["something else", reference] for reference in REFERENCES]
    assert metric.compute(predictions=PREDICTIONS, references=several) == {name: pytest.approx(EXPECTED[name])}
    for pair in zip(PREDICTIONS, REFERENCES, strict=True):
        metric.add(prediction=pair[0], reference=pair[1])
    assert metric.compute() == {name: pytest.approx(EXPECTED[name])}


@pytest.mark.parametrize("load", [metrics.load, _by_path])
def test_token_recall(load):
    metric = load("token_recall")
    runs = {"references": [[4.0, 3.0, 2.0, 1.0, float("inf")]] * 2}
    runs["predictions"] = [[4.0, 1.0, 2.0, 3.0, 0.0], [4.0, 3.0, 2.0, 1.0, float("inf")]]
    assert metric.compute(**runs, p=0.5) == {"token_recall": 0.75}
    assert metric.compute(**runs) == {"token_recall": 1.0}
    runs["predictions"] = [[True, False, True, True, True], [False] * 5]
    assert metric.compute(**runs, p=0.5, kept=True) == {"token_recall": 0.25}


def test_settings_of_compute_reach_the_metric():
    metric = metrics.load("exact_match")
    assert metric.compute(predictions=["Yes."], references=["yes"], normalize=False) == {"exact_match": 0.0}


def test_metrics_combine():
    both = evaluate.combine([metrics.load("rouge_l"), metrics.load("token_f1")])
    result = both.compute(predictions=PREDICTIONS, references=REFERENCES)
    assert result == {name: pytest.approx(EXPECTED[name]) for name in ("rouge_l", "token_f1")}


def test_in_memory_leaves_nothing_on_disk(tmp_path):
    metrics.load("rouge_l").compute(predictions=PREDICTIONS, references=REFERENCES)
    assert not list(tmp_path.rglob("*"))


def test_two_on_disk_at_once_do_not_mix(tmp_path):
    first, second = (metrics.load("exact_match", keep_in_memory=False) for _ in range(2))
    first.add_batch(predictions=["a b", "c"], references=["a b", "c"])
    second.add_batch(predictions=["x"], references=["y"])
    assert first.compute() == {"exact_match": 1.0}
    assert second.compute() == {"exact_match": 0.0}
    assert list(tmp_path.rglob("*.lock"))


def test_unknown_names_are_listed():
    for call in (metrics.load, _by_path):
        with pytest.raises(ConfigError, match="no metric 'rouge'; expected one of exact_match, rouge_l"):
            call("rouge")


_SCRIPT = """
import json, multiprocessing, sys
from pathlib import Path
import evaluate
from fedfstq_hf import metrics

def scores(metric, predictions, references):
    for pair in zip(predictions, references):
        metric.add(prediction=pair[0], reference=pair[1])
    return metric.compute()["rouge_l"]

def work(pair):
    metric = evaluate.load(metrics.SCRIPT, "rouge_l")
    return [scores(metric, *pair) for _ in range(5)]

pairs = json.loads(sys.argv[1])
without_home = [scores(metrics.load("rouge_l"), *pair) for pair in pairs]
evaluate.config.HF_MODULES_CACHE = Path(sys.argv[2], "modules")
evaluate.config.HF_METRICS_CACHE = Path(sys.argv[2], "metrics")
with multiprocessing.get_context("fork").Pool(len(pairs)) as pool:
    print(json.dumps([without_home, pool.map(work, pairs, chunksize=1)]))
"""


def test_without_a_writable_home_and_by_path_in_processes_that_share_a_cold_cache(tmp_path):
    pairs = [(PREDICTIONS, REFERENCES), (["one"], ["two"]), (["three"], ["three"])]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "XDG_"))}
    environment |= {"HF_HUB_OFFLINE": "1", "HOME": os.devnull + "/nowhere"}
    command = [sys.executable, "-c", _SCRIPT, json.dumps(pairs), str(tmp_path)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, timeout=120, check=True)
    without_home, by_path = json.loads(done.stdout)
    expected = [EXPECTED["rouge_l"], 0.0, 1.0]
    assert without_home == pytest.approx(expected)
    assert by_path == [pytest.approx([value] * 5) for value in expected]
