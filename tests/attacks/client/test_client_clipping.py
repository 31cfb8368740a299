"""One client's influence on a round is bounded by its length, also where most messages say nothing."""

import math

import pytest
import torch
from light import LightClient, found, initial_state
from light_updates import SIZE, found_enrolled, make_message, ones, post

from fedfstq_hf.codec import SparseUpdate
from fedfstq_hf.federation import adapter_file, scaffold
from fedfstq_hf.federation.aggregation import UsualNorm, clip_scale, longest_norm
from fedfstq_hf.federation.client.participation import LocalResult
from fedfstq_hf.federation.control import Control
from fedfstq_hf.federation.founding import found_federation
from fedfstq_hf.federation.scaffold import VariateChanges
from fedfstq_hf.federation.server.coordinator import Coordinator

ADAPTER = math.sqrt(sum(float(tensor.square().sum()) for tensor in initial_state().values()))  # about 13
NAMES = "abcdefgh"


def close(mailbox, round, *norms, coordinator=None):
    """The lengths that the round used, from messages of these."""
    for name, norm in zip(NAMES, norms, strict=False):
        post(mailbox, name, ones(norm), round=round)
    record = (coordinator or Coordinator(mailbox)).close_round()
    assert [u.norm for u in record.accepted] == pytest.approx(list(norms), rel=1e-5)  # as they came
    return [u.norm * u.scale for u in record.accepted]


@pytest.mark.parametrize(
    ("norms", "used"),
    [
        ([1, 1, 1, 1000], [1, 1, 1, 10]),
        ([0, 0, 1, 1000], [0, 0, 1, 10]),
        ([0, 0, 0, 1, 1000, 1], [0, 0, 0, 1, 10, 1]),
        ([0, 0, 0, 1000], [0, 0, 0, ADAPTER]),  # nothing else to compare it with
        ([0, 0, 0, 0, 1000, 1000], [0, 0, 0, 0, ADAPTER, ADAPTER]),  # nor where two of them agree
        ([0, 0, 0, 3], [0, 0, 0, 3]),  # who alone has something to say is heard
        ([0, 0, 0, 0.1, 0.2], [0, 0, 0, 0.1, 0.2]),
        ([0, 0, 0, 0], [0, 0, 0, 0]),
    ],
)
def test_in_a_first_round(tmp_path, norms, used):
    mailbox = found_enrolled(tmp_path, NAMES, rounds=9, min_clients=len(norms))
    coordinator = Coordinator(mailbox)
    before = coordinator.adapter.clone()
    assert close(mailbox, 0, *norms, coordinator=coordinator) == pytest.approx(used, rel=1e-4)
    assert float((coordinator.adapter - before).norm()) == pytest.approx(sum(used) / len(used), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("restarted", [False, True])
def test_later_the_round_before_tells(tmp_path, restarted):
    """Lengths of 0.1 are usual; one of 1000 among empty messages counts as ten times that."""
    mailbox = found_enrolled(tmp_path, NAMES, rounds=9, min_clients=4)
    coordinator = Coordinator(mailbox)
    close(mailbox, 0, 0.1, 0.1, 0.1, 0.1, coordinator=coordinator)
    used = close(mailbox, 1, 0, 0, 0, 1000, coordinator=None if restarted else coordinator)
    assert used == pytest.approx([0, 0, 0, 1], rel=1e-4)


def test_a_client_does_not_raise_its_own_limit(tmp_path):
    """What was used is compared with, not what was sent; and the adapter's length holds on."""
    mailbox = found_enrolled(tmp_path, NAMES, rounds=9, min_clients=4)
    for round in range(4):
        length = float(Coordinator(mailbox).adapter.norm())
        (*_, used) = close(mailbox, round, 0, 0, 0, 1e6)
        assert used <= length * 1.0001
    assert length < 3 * ADAPTER


def test_a_limit_that_is_off_stays_off(tmp_path):
    mailbox = found_enrolled(tmp_path, NAMES, rounds=9, min_clients=4, clip=None)
    assert close(mailbox, 0, 0, 0, 0, 1000) == pytest.approx([0, 0, 0, 1000])


def test_in_an_adapter_of_zeros_a_single_message_has_nothing_to_be_compared_with(tmp_path):
    mailbox = found(tmp_path / "other", rounds=9)  # for its spec
    spec = Coordinator(mailbox).spec
    zeros = adapter_file.dump({name: torch.zeros_like(tensor) for name, tensor in initial_state().items()})
    mailbox = type(mailbox)(tmp_path / "box", durable=False)
    found_federation(mailbox, spec, zeros, b"{}\n", control=Control(clients=None), now=0.0)
    assert close(mailbox, 0, 0, 0, 1000) == [0, 0, 0]
    assert close(mailbox, 1, 0, 0, 0, 1, 1000) == pytest.approx([0, 0, 0, 1, 10], rel=1e-4)


def test_of_refinements_too(tmp_path):
    """Previews were empty, and one refinement is huge."""
    mailbox = found_enrolled(
        tmp_path, NAMES, rounds=9, min_clients=4, refinement_budget="1bpp", preview_step=0.5, error_feedback=0.0
    )
    coordinator = Coordinator(mailbox)
    assert close(mailbox, 0, 0, 0, 0, 0, coordinator=coordinator) == [0, 0, 0, 0]
    data = make_message(mailbox, "d", ones(1000), params={"refinement": True})
    mailbox.post_update(0, "d", data, refinement=True)
    close(mailbox, 1, 0, 0, 0, 0, coordinator=coordinator)
    (entry,) = coordinator.record.refinements
    assert entry.norm * entry.scale == pytest.approx(ADAPTER, rel=1e-4)


# The rule alone


def test_the_round_before_is_asked_only_where_most_say_nothing():
    def asked():
        raise AssertionError

    assert longest_norm([1, 2, 3], 10.0, asked) == 20
    assert longest_norm([0, 2, 3], 10.0, asked) == 20
    assert (
        longest_norm([0, 0], 10.0, asked)
        == longest_norm([], 10.0, asked)
        == longest_norm([0, 0, 9], None, asked)
        == math.inf
    )


@pytest.mark.parametrize(
    ("norms", "usual", "expected"),
    [
        ([0, 0, 5], UsualNorm((1.0, 1.0, 0.0), 100.0), 10),
        ([0, 0, 5], UsualNorm((1.0, 1.0), 3.0), 3),
        ([0, 5], UsualNorm((), 100.0), 50),
        ([0, 5], UsualNorm((7.0,), 0.0), 50),
        ([0, 5], UsualNorm(), 0),
        ([0, 0, 5, 6], UsualNorm(), 50),
    ],
)
def test_the_longest_where_most_say_nothing(norms, usual, expected):
    assert longest_norm(norms, 10.0, lambda: usual) == expected


def test_the_usual_lengths_are_those_that_were_used(tmp_path):
    mailbox = found_enrolled(tmp_path, NAMES, rounds=9, min_clients=3)
    coordinator = Coordinator(mailbox)
    close(mailbox, 0, 1, 1, 1000, coordinator=coordinator)
    usual = UsualNorm.of(coordinator.record, coordinator.adapter)
    assert usual.lengths == pytest.approx((1, 1, 10), rel=1e-4)
    assert usual.adapter == pytest.approx(float(coordinator.adapter.norm()), rel=1e-6)


def test_how_much_of_an_update_is_left():
    assert (
        clip_scale(2.0, 4.0),
        clip_scale(4.0, 4.0),
        clip_scale(8.0, 4.0),
        clip_scale(0.0, 0.0),
        clip_scale(8.0, 0.0),
    ) == (1, 1, 0.5, 1, 0)


# Control variates


@pytest.mark.parametrize(
    ("lengths", "added"),
    [([1, 1, 100], 1 + 1 + 2), ([0, 0, 1, 100], 1 + 2), ([0, 0, 100], 0), ([100], 100), ([0, 0], 0)],
)
def test_changes_of_control_variates_are_bounded_alike(lengths, added):
    changes = VariateChanges(SIZE, [float(length) for length in lengths], 2.0)
    for length in lengths:
        changes.add(SparseUpdate(SIZE, None, ones(length)))
    assert float(changes.sum.norm()) == pytest.approx(added, rel=1e-5)


def test_one_huge_control_variate_among_empty_ones_is_not_published(tmp_path):
    mailbox = found(tmp_path, rounds=9, min_clients=1, scaffold=True, num_clients=3, max_message_bytes=9000)
    coordinator = Coordinator(mailbox)
    for name, size in (("a", 0.0), ("b", 0.0), ("c", 1e6)):
        client = LightClient(mailbox, name, None)
        assignment = client.participation.next()
        change = torch.full((SIZE,), size)
        client.participation.complete(assignment, LocalResult(assignment.adapter, None, 1, {}, variate=change))
    coordinator.close_round()
    variate = scaffold.read_variate(mailbox, coordinator.record, coordinator.spec, SIZE)
    assert not variate.any()
