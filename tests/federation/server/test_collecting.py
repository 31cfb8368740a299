"""Collecting a round: weights, caps and clipping against numbers worked out by hand; two readings, one in memory."""

import gc
import weakref

import pytest
import torch
from light import SCHEMA, found
from light_updates import SIZE, delta, found_enrolled, make_message, ones, post

from fedfstq_hf.codec import SparseUpdate, get_codec
from fedfstq_hf.federation.control import Control, Enrolment
from fedfstq_hf.federation.record import RoundRecord
from fedfstq_hf.federation.server.collecting import Collector, precision_weights
from fedfstq_hf.federation.server.coordinator import Coordinator
from fedfstq_hf.federation.server.screening import Screening
from fedfstq_hf.federation.spec import FederationSpec


def close(mailbox):
    """The next record, and the change it made, (SIZE,)."""
    coordinator = Coordinator(mailbox)
    before = coordinator.adapter.clone()
    record = coordinator.close_round()
    assert record is not None
    return record, coordinator.adapter - before


def scales(record):
    return {update.client_id: update.scale for update in record.accepted}


def weights(record):
    return {update.client_id: update.weight for update in record.accepted}


# Clipping


def test_an_update_above_the_limit_is_scaled_down_to_it(tmp_path):
    """Norms 1, 2, 4, 60: the lower median is 2, twice that is 4; 60 becomes 4, and 4 stays."""
    mailbox = found(tmp_path, min_clients=4, clip=2.0)
    for name, norm in zip("abcd", (1, 2, 4, 60), strict=True):
        post(mailbox, name, ones(norm))
    record, change = close(mailbox)
    assert scales(record) == {"a": 1, "b": 1, "c": pytest.approx(1), "d": pytest.approx(4 / 60)}
    assert [update.norm for update in record.accepted] == pytest.approx([1, 2, 4, 60])  # as they came
    assert torch.allclose(change, ones((1 + 2 + 4 + 4) / 4), atol=1e-6)


def test_of_two_updates_the_smaller_sets_the_limit(tmp_path):
    """One attacker beside one honest client must not set its own limit."""
    mailbox = found(tmp_path, clip=10.0)
    post(mailbox, "a", ones(1e6))
    post(mailbox, "b", ones(1))
    record, change = close(mailbox)
    assert scales(record) == {"a": pytest.approx(1e-5), "b": 1}
    assert float(change.norm()) == pytest.approx((10 + 1) / 2, rel=1e-4)


def test_clipping_can_be_switched_off(tmp_path):
    mailbox = found(tmp_path, clip=None)
    post(mailbox, "a", ones(1000))
    post(mailbox, "b", ones(1))
    record, change = close(mailbox)
    assert scales(record) == {"a": 1, "b": 1}
    assert float(change.norm()) == pytest.approx(1001 / 2, rel=1e-5)


def test_a_median_of_zero_wipes_nobody_out(tmp_path):
    """Where most clients send nothing (a tiny budget, a fresh adapter), the others still count."""
    mailbox = found(tmp_path, min_clients=3, clip=2.0)
    for name, norm in (("a", 0), ("b", 0), ("c", 9)):
        post(mailbox, name, ones(norm))
    record, change = close(mailbox)
    assert scales(record) == {"a": 1, "b": 1, "c": 1}
    assert float(change.norm()) == pytest.approx(3, rel=1e-5)


def test_refused_updates_do_not_count_for_the_median(tmp_path):
    mailbox = found(tmp_path, min_clients=3, clip=2.0)
    for name, norm in (("a", 5), ("b", 5), ("c", 50)):
        post(mailbox, name, ones(norm))
    for name in "xyz":
        post(mailbox, name, ones(0.01), base="0" * 64)
    record, _ = close(mailbox)
    assert scales(record) == {"a": 1, "b": 1, "c": pytest.approx(0.2)}
    assert len(record.refused) == 3


# Weights


def test_one_client_cannot_claim_to_have_nearly_all_examples(tmp_path):
    """Examples 4, 10, 20, 10**9: the lower median is 10, three times that is 30."""
    mailbox = found(tmp_path, min_clients=4, weight_cap=3.0, clip=None)
    for name, count in zip("abcd", (4, 10, 20, 10**9), strict=True):
        post(mailbox, name, ones(1), num_examples=count)
    record, _ = close(mailbox)
    assert weights(record) == pytest.approx({"a": 4 / 64, "b": 10 / 64, "c": 20 / 64, "d": 30 / 64})
    assert [update.num_examples for update in record.accepted] == [4, 10, 20, 10**9]  # what it said is recorded


def test_the_cap_on_weights_can_be_switched_off(tmp_path):
    mailbox = found(tmp_path, weight_cap=None)
    post(mailbox, "a", ones(1), num_examples=1)
    post(mailbox, "b", ones(1), num_examples=999)
    assert weights(close(mailbox)[0]) == pytest.approx({"a": 0.001, "b": 0.999})


def test_a_client_can_be_capped_alone(tmp_path):
    mailbox = found_enrolled(tmp_path, {"a": Enrolment(max_examples=2), "b": Enrolment(max_examples=50)})
    post(mailbox, "a", ones(1), num_examples=8)
    post(mailbox, "b", ones(1), num_examples=8)
    assert weights(close(mailbox)[0]) == pytest.approx({"a": 0.2, "b": 0.8})


def test_all_can_weigh_alike(tmp_path):
    mailbox = found(tmp_path, weights="uniform")
    post(mailbox, "a", ones(1), num_examples=1)
    post(mailbox, "b", ones(1), num_examples=9)
    assert weights(close(mailbox)[0]) == pytest.approx({"a": 0.5, "b": 0.5})


def test_a_message_that_is_mostly_noise_weighs_less(tmp_path):
    """By precision: `a` has the most examples and few bytes: what it says is longer than what it means."""
    mailbox = found(tmp_path, weights="precision", codec="fstq", clip=None)
    post(mailbox, "a", ones(1), num_examples=90, encoded_by="fstq", max_bytes=14)
    for name in "bc":
        post(mailbox, name, ones(1), num_examples=5, encoded_by="fstq", max_bytes=40)
    record, _ = close(mailbox)
    norms = {update.client_id: update.norm for update in record.accepted}
    assert norms["a"] > 2 * norms["b"]
    assert weights(record) == pytest.approx(
        dict(zip("abc", precision_weights([50, 5, 5], [norms[name] for name in "abc"]), strict=True))
    )  # 50: `weight_cap` is ten times the median
    assert weights(record)["a"] < weights(record)["b"]


def test_a_stale_update_weighs_less(tmp_path):
    mailbox = found(tmp_path, rounds=5, max_staleness=2, staleness_discount=0.5, min_clients=2)
    late = {name: make_message(mailbox, name, ones(1), num_examples=8) for name in "cd"}
    for round in (0, 1):
        for name in "ab":
            post(mailbox, name, ones(1), num_examples=8, round=round)
        if round == 1:
            mailbox.post_update(0, "c", late["c"])  # one round late
        record, _ = close(mailbox)
    assert weights(record) == pytest.approx({"a": 0.4, "b": 0.4, "c": 0.2})
    mailbox.post_update(0, "d", late["d"])  # two rounds late
    post(mailbox, "a", ones(1), num_examples=8, round=2)
    record, _ = close(mailbox)
    assert weights(record) == pytest.approx({"a": 0.8, "d": 0.2})
    assert {update.client_id: update.staleness for update in record.accepted} == {"a": 0, "d": 2}


# Reading


def test_each_message_is_read_twice_and_one_update_is_in_memory(tmp_path, monkeypatch):
    names = [f"c{number:02}" for number in range(12)]
    mailbox = found(tmp_path, min_clients=len(names))
    for name in names:
        post(mailbox, name, delta(1))
    read, alive, most = [], weakref.WeakSet(), [0]
    original, codec = mailbox.read_update, type(get_codec("fp32"))
    decode = codec.decode

    def counted(ref, **limit):
        read.append(ref.client_id)
        return original(ref, **limit)

    def watched(self, payload, schema, context=None):
        update = decode(self, payload, schema, context)
        alive.add(update.values)
        gc.collect()
        most[0] = max(most[0], len(alive))
        return update

    monkeypatch.setattr(mailbox, "read_update", counted)
    monkeypatch.setattr(codec, "decode", watched)
    coordinator = Coordinator(mailbox)
    assert coordinator.close_round().round == 1
    assert read == names * 2
    assert most[0] <= 2  # the one at hand, and the one before it that is just being let go


def test_work_is_proportional_to_what_was_sent(tmp_path, monkeypatch):
    """A sparse update is added at its coordinates; nothing of it is made dense."""
    mailbox = found(tmp_path, codec="topk", min_clients=2)
    sparse = torch.zeros(SIZE)
    sparse[5] = 1.0
    for name in "ab":
        post(mailbox, name, sparse, encoded_by="topk")
    monkeypatch.setattr(SparseUpdate, "to_dense", lambda self: pytest.fail("a client's update was made dense"))
    record, change = close(mailbox)
    assert change[5] == 1.0
    assert len(record.accepted) == 2


def test_what_was_refused_is_looked_at_again_when_others_are_enrolled(tmp_path):
    mailbox = found(tmp_path)
    sizes = [len(post(mailbox, name, ones(norm))) for name, norm in (("a", 1), ("b", 2))]
    base = RoundRecord.from_json(mailbox.read(0, "round.json")).adapter_digest
    collector = Collector(mailbox, 0, num_params=SIZE, base=lambda round: base, selected=lambda round: None)
    spec, refs = FederationSpec.from_json(mailbox.read(0, "spec.json")), list(mailbox.list_updates(0))
    before, after = (Control(clients=dict.fromkeys(names, Enrolment())) for names in ("a", "ab"))
    collected = collector.collect(refs, Screening(spec, SCHEMA, before))
    assert [entry.client_id for entry in collected.accepted] == ["a"]
    assert [entry.client_id for entry in collected.refused] == ["b"]
    assert [ref.client_id for ref in collector.open(refs, before)] == ["a"]
    assert [ref.client_id for ref in collector.open(refs, after)] == ["a", "b"]
    collected = collector.collect(refs, Screening(spec, SCHEMA, after))
    assert [(entry.client_id, entry.num_bytes) for entry in collected.accepted] == list(zip("ab", sizes, strict=True))
    assert collected.refused == ()
