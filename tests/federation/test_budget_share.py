"""Budgets by the number of examples: who weighs more in the mean may say more."""

import json

import numpy as np
import pytest
import torch

from fedfstq_hf.codec import Schema, message
from fedfstq_hf.errors import BudgetError, ConfigError
from fedfstq_hf.federation.client.session import ClientSession
from fedfstq_hf.federation.spec import FederationSpec
from tests.federation.light import make_spec

SCHEMA = Schema.from_state_dict({f"layer.{i}": torch.zeros(16, 512) for i in range(4)})
DELTA = torch.randn(SCHEMA.num_params, generator=torch.Generator().manual_seed(0))


def sizes(num_examples, max_bytes=900, **spec):
    """Bytes of the whole message and of its payload."""
    session = ClientSession("anna", make_spec(codec="fstq", schema=SCHEMA.fingerprint, **spec), SCHEMA)
    data = session.finish(0, "0" * 64, DELTA, fisher=None, num_examples=num_examples, max_bytes=max_bytes).message
    return len(data), len(message.unpack(data)[1])


def test_shares_follow_the_number_of_examples_up_to_the_cap_on_weights():
    spec = make_spec(mean_examples=40)
    assert [spec.budget_share(n) for n in (10, 40, 90, 4000)] == [0.5, 1.0, 1.5, 10.0**0.5]
    assert make_spec(mean_examples=40, weight_cap=None).budget_share(4000) == 10.0
    assert make_spec().budget_share(4000) == 1.0


def test_the_payload_grows_with_the_examples_and_the_header_stays():
    (whole, payload), (smaller, part) = sizes(40, mean_examples=40), sizes(10, mean_examples=40)
    assert whole <= 900
    assert part == pytest.approx(payload / 2, abs=8)
    assert whole - payload == pytest.approx(smaller - part, abs=8)
    assert sizes(10) == pytest.approx(sizes(40), abs=8)


def test_a_budget_below_the_header_is_refused_as_ever():
    with pytest.raises(BudgetError, match="An uplink budget of 20 bytes"):
        sizes(80, max_bytes=20, mean_examples=40)


def test_the_spec_keeps_it_and_refuses_what_is_no_number_of_examples():
    spec = make_spec(mean_examples=40)
    assert FederationSpec.from_json(spec.to_json()) == spec
    assert json.loads(spec.to_json())["mean_examples"] == 40
    for wrong in (0, -1, 2.5, True, "many"):
        with pytest.raises(ConfigError, match="mean_examples must be a whole number of at least 1"):
            make_spec(mean_examples=wrong)


def test_the_root_has_less_noise_than_equal_budgets_and_better_worst_cases_than_proportion():
    # clients of unequal size, 10 of 100 in a round: sum of weight^2 / size of message, at the same bytes
    rng = np.random.default_rng(0)
    examples = np.ceil(np.exp(rng.normal(3, 1.2, 100)))
    spec = make_spec(mean_examples=round(examples.mean()), weight_cap=None)
    rules = {
        "equal": np.ones(100),
        "root": np.array([spec.budget_share(int(n)) for n in examples]),
        "proportion": examples / examples.mean(),
    }
    rounds = [rng.permutation(100)[:10] for _ in range(200)]
    mean, worst, largest = {}, {}, {}
    for name, shares in rules.items():
        sizes = shares / shares.mean()
        noise = [(examples[r] ** 2 / examples[r].sum() ** 2 / sizes[r]).sum() for r in rounds]
        mean[name], worst[name], largest[name] = np.mean(noise), np.max(noise), sizes.max()
    assert mean["root"] < 0.7 * mean["equal"]
    assert worst["root"] < worst["proportion"]
    assert largest["root"] < 0.6 * largest["proportion"]
