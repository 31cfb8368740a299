"""The metrics' arithmetic against examples computed by hand, and against other packages where they are installed."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from fedfstq_hf.errors import ConfigError, DataError, NonFiniteError
from fedfstq_hf.metrics.sensitive_tokens import token_recall
from fedfstq_hf.metrics.text_scores import (
    RougeL,
    common_subsequence_length,
    exact_match,
    mean_of_best,
    normalize_answer,
    rouge_l,
    token_f1,
    words,
)
from fedfstq_hf.sensitivity import TokenSensitivity

_VOCABULARY = ["the", "a", "cat", "cats", "sat", "sitting", "nationally", "national", "hopping", "hop", "happily"]


def _random_texts(count: int) -> list[tuple[str, str]]:
    generator = random.Random(0)
    return [
        tuple(" ".join(generator.choices(_VOCABULARY, k=generator.randint(1, 14))) for _ in range(2))
        for _ in range(count)
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It's 5.3 mg, b-cell!", ["it", "s", "5", "3", "mg", "b", "cell"]),
        ("Élève naïve", ["élève", "naïve"]),
        ("तेलुगु भाषा", ["तेलुगु", "भाषा"]),  # vowel signs are marks, not separators
        ("血糖 is 高", ["血", "糖", "is", "高"]),
        ("か\u3099く", ["か\u3099", "く"]),
        ("snake_case", ["snake", "case"]),
        ("  !? ", []),
    ],
)
def test_words_of_any_script(text, expected):
    assert words(text) == expected


def test_answers_are_compared_without_case_punctuation_and_articles():
    assert normalize_answer("The  Quick-brown fox, an «Ape» and A theory.") == "quickbrown fox ape and theory"


def test_exact_match():
    assert exact_match("The answer.", "answer") == 1.0
    assert exact_match("The answer.", "answer", normalize=False) == 0.0
    assert exact_match("an answer too", "answer") == 0.0


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("the cat sat down", "cat sat", 2 * (2 / 3) * 1 / (2 / 3 + 1)),
        ("yes yes no", "yes no no", 2 / 3),  # bags: one yes and one no in common
        ("the", "a", 1.0),
        ("", "yes", 0.0),
        ("maybe", "yes", 0.0),
        ("血糖高", "高血糖", 1.0),
    ],
)
def test_token_f1(prediction, reference, expected):
    assert token_f1(prediction, reference) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("police kill the gunman", "police killed the gunman", (3 / 4, 3 / 4, 3 / 4)),  # Lin 2004, section 3.1
        ("the gunman kill police", "police killed the gunman", (1 / 2, 1 / 2, 1 / 2)),
        ("the cat sat", "the big cat sat down", (1.0, 3 / 5, 3 / 4)),
        ("", "something", (0.0, 0.0, 0.0)),
        ("something", "else", (0.0, 0.0, 0.0)),
    ],
)
def test_rouge_l(prediction, reference, expected):
    assert rouge_l(prediction, reference) == pytest.approx(RougeL(*expected))


def test_common_subsequence_against_all_subsets():
    generator = random.Random(1)
    for _ in range(30):
        first, second = ([generator.choice("abc") for _ in range(generator.randint(0, 7))] for _ in range(2))
        subsets = (
            [item for place, item in enumerate(first) if chosen >> place & 1] for chosen in range(2 ** len(first))
        )
        longest = max(len(subset) for subset in subsets if _is_subsequence(subset, second))
        assert common_subsequence_length(first, second) == longest


def _is_subsequence(short: list[str], long: list[str]) -> bool:
    rest = iter(long)
    return all(item in rest for item in short)


def test_rouge_l_is_that_of_rouge_score_on_ascii_text():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    for prediction, reference in _random_texts(100):
        assert rouge_l(prediction, reference) == pytest.approx(tuple(scorer.score(reference, prediction)["rougeL"]))


def test_token_recall_of_a_kept_mask():
    reference = [5.0, 1.0, 4.0, 3.0, 2.0]  # p = 0.6: the three at 0, 2 and 3
    assert token_recall(reference, kept=[1, 1, 1, 0, 0], p=0.6) == pytest.approx(2 / 3)
    assert token_recall(reference, kept=[True] * 5, p=0.6) == 1.0
    assert token_recall(reference, kept=[0, 1, 0, 0, 1], p=0.6) == 0.0


def test_token_recall_of_sensitivities():
    reference = [5.0, 1.0, 4.0, 3.0, 2.0]
    assert token_recall(reference, sensitivities=[1.0, 9.0, 8.0, 7.0, 0.0], p=0.6) == pytest.approx(2 / 3)
    assert token_recall(reference, sensitivities=np.array(reference) * 1e-9, p=0.6) == 1.0


def test_tokens_never_seen_are_left_out_of_the_reference_and_not_retained_by_the_method():
    reference = [math.inf, 4.0, 3.0, 2.0, 1.0]  # p = 0.5 of four: 1 and 2
    assert token_recall(reference, sensitivities=[9.0, 4.0, 3.0, 2.0, 1.0], p=0.5) == 1.0
    assert token_recall(reference, sensitivities=[9.0, math.inf, 3.0, 2.0, 1.0], p=0.5) == 0.5
    assert token_recall(reference, sensitivities=[math.inf] * 5, p=0.5) == 0.0


def test_token_recall_of_a_random_order_is_about_p():
    generator = np.random.default_rng(0)
    reference, other = generator.random(20_000), generator.random(20_000)
    assert token_recall(reference, sensitivities=other, p=0.3) == pytest.approx(0.3, abs=0.02)


def test_share_of_tokens_does_not_grow_by_rounding_and_is_at_least_one():
    reference = np.arange(30, 0, -1.0)
    kept = np.arange(30) < 3
    assert token_recall(reference, kept=kept, p=0.1) == 1.0  # 0.1 * 30 is a little above 3
    assert token_recall(reference, kept=kept, p=0.001) == 1.0
    assert token_recall(reference, kept=kept) == 1.0  # the default is 0.1


def test_token_recall_of_tables():
    tables = [TokenSensitivity(8), TokenSensitivity(8)]
    ids = torch.arange(6)[None]
    tables[0].update(ids, torch.tensor([[6.0, 5, 4, 3, 2, 1]]))
    tables[1].update(ids, torch.tensor([[6.0, 1, 2, 3, 4, 5]]))
    reference, method = (table.scores() for table in tables)
    top = [set(table.top(3).tolist()) for table in tables]
    assert token_recall(reference, sensitivities=method, p=0.5) == pytest.approx(len(top[0] & top[1]) / 3)


def test_token_recall_refuses_what_it_cannot_compare():
    for p in (0.0, 1.5, math.nan):
        with pytest.raises(ConfigError, match="in \\(0, 1\\]"):
            token_recall([1.0], kept=[1], p=p)
    for given in ({}, {"kept": [1], "sensitivities": [1.0]}):
        with pytest.raises(ConfigError, match="either"):
            token_recall([1.0], **given)
    with pytest.raises(DataError, match=r"\(2,\) and \(1,\)"):
        token_recall([1.0, 2.0], kept=[1])
    with pytest.raises(DataError, match="measured no token"):
        token_recall([math.inf], kept=[1])
    with pytest.raises(NonFiniteError, match="sensitivities holds NaN"):
        token_recall([1.0], sensitivities=[math.nan])


def test_best_reference_counts():
    assert mean_of_best(token_f1, ["yes", "no"], [["no", "yes"], "yes"]) == 0.5
    with pytest.raises(DataError, match="no predictions"):
        mean_of_best(token_f1, [], [])
    with pytest.raises(DataError, match="'yes' has no reference"):
        mean_of_best(token_f1, ["yes"], [[]])
