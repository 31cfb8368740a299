"""A seeded slice of recipes/benchmarks/fuzz.py, and that it would notice a decoder that gives way."""

import random

import pytest
import torch

from fedfstq_hf.codec import SparseUpdate
from recipes.benchmarks import fuzz
from tests.attacks.corpus import CODECS, TARGETS

CASES = 120


@pytest.mark.parametrize("name", CODECS)
def test_a_slice(name):
    target = fuzz.make_target(name)
    with fuzz.guarded():
        findings = [finding for finding in fuzz.run([target], CASES, seed=7) if finding]
    assert findings == []
    assert target.counts["container"] > 0.4 * CASES
    assert target.counts["refused"] > 0


class GivesWay:
    def __init__(self, result):
        self.result = result

    def decode(self, payload, schema, context=None):
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


@pytest.mark.parametrize(
    ("result", "problem"),
    [
        (IndexError("out of range"), "IndexError"),
        (SparseUpdate(329, None, torch.full((329,), float("nan"))), "not finite"),
        (SparseUpdate(329, None, torch.zeros(328)), "shape"),
        (SparseUpdate(328, None, torch.zeros(328)), "328 coordinates"),
        (SparseUpdate(329, torch.tensor([3, 2]), torch.zeros(2)), "ascend"),
        (SparseUpdate(329, torch.tensor([329]), torch.zeros(1)), "ascend"),
        (SparseUpdate(329, torch.tensor([1]), torch.zeros(2)), "2"),
    ],
)
def test_a_bad_decoder_is_found(result, problem):
    target = fuzz.make_target("fp32")
    target.codec = GivesWay(result)
    finding = fuzz.attack(target, random.Random(0), target.payloads, sealed=True)
    assert problem in finding.problem


def test_a_container_that_lets_everything_through_is_found(monkeypatch):
    target = TARGETS["fp32"]
    monkeypatch.setattr(fuzz.message, "unpack_signed", lambda data: fuzz.message.Unpacked(None, b"", b"", None))
    findings = [fuzz.attack(target, random.Random(i), target.messages, sealed=False) for i in range(5)]
    assert any(finding and "accepted" in finding.problem for finding in findings)
