"""What refinements cost on the simulated clock, by hand: the uplink is busy while the next round goes on."""

import numpy as np
import pytest

from fedfstq_hf.errors import ConfigError
from fedfstq_hf.recipe.network import LinkProfile, LinkRates, deliver, round_cost

# 8 bits a byte: 1,000,000 bytes take 8 s, 1 s and 4 s; downloads of as many take 1 s, 1 s and 0.5 s
RATES = LinkRates(uplink=np.array([1e6, 8e6, 2e6]), downlink=np.array([8e6, 8e6, 16e6]))
MB = 1_000_000
HAND = LinkProfile("hand", server_seconds=0.25)
DOWN = dict.fromkeys(range(3), MB)
COMPUTE = {0: 3.0, 1: 3.0, 2: 3.0}


def cost(profile=HAND, **traffic):
    return round_cost(profile, RATES, downlink_bytes=DOWN, compute_seconds=COMPUTE, **traffic)


def test_a_round_waits_for_previews_only_and_what_is_left_is_the_backlog():
    # clients 0 and 1 are ready at 1 + 3 = 4 s and have sent at 4 + 1 and 4 + 0.5 s; the server adds 0.25 s.
    # Their refinements are there at 5 + 8 and 4.5 + 0.5 s: the round is over at 5.25 s.
    found = cost(uplink_bytes={0: MB // 8, 1: MB // 2}, refinement_bytes={0: MB, 1: MB // 2})
    assert found.seconds == pytest.approx(5.25)
    assert found.straggler == 0
    assert found.backlog == pytest.approx({0: 7.75})


def test_a_client_s_own_backlog_delays_its_message():
    # it could send from 4 s on, but its uplink is busy until 6 s: 6 + 1 = 7 s.
    found = cost(uplink_bytes={0: MB // 8, 1: MB}, backlog={0: 6.0})
    assert found.seconds == pytest.approx(7.25)
    assert (found.straggler, found.backlog) == (0, {})
    # a backlog that is sent before the client is ready delays nothing
    assert cost(uplink_bytes={0: MB // 8}, backlog={0: 3.9}).seconds == pytest.approx(5.25)


def test_a_round_is_not_over_before_the_backlog_of_those_who_are_not_in_it():
    found = cost(uplink_bytes={0: MB // 8, 1: MB}, backlog={2: 9.0})
    assert found.seconds == pytest.approx(9.25)
    assert (found.straggler, found.backlog) == (0, {})
    assert cost(uplink_bytes={0: MB // 8, 1: MB}, backlog={2: 4.0}).seconds == pytest.approx(5.25)


def test_a_refinement_follows_backlog_and_message():
    # client 0: busy until 6 s, message until 7 s, refinement until 9 s; the round is over at 7.25 s.
    found = cost(uplink_bytes={0: MB // 8}, refinement_bytes={0: MB // 4}, backlog={0: 6.0})
    assert found.seconds == pytest.approx(7.25)
    assert found.backlog == pytest.approx({0: 1.75})


def test_a_client_without_a_preview_sends_its_refinement_and_is_not_waited_for():
    # client 2 is ready at 0.5 + 3 s and has sent at 3.5 + 4 s; the round is over at 4 + 1 + 0.25 s.
    found = cost(uplink_bytes={0: MB // 8}, refinement_bytes={2: MB})
    assert found.seconds == pytest.approx(5.25)
    assert found.straggler == 0
    assert found.backlog == pytest.approx({2: 2.25})


def test_energy_counts_the_refinement():
    # client 0: 4 W * 3 s + 2 W * (1 + 2) s = 18 J; client 2, refinement only: 4 W * 3 s + 2 W * 4 s = 20 J.
    found = cost(uplink_bytes={0: MB // 8}, refinement_bytes={0: MB // 4, 2: MB}, backlog={0: 100.0})
    assert found.energy_straggler == pytest.approx(18)
    assert found.energy_mean == pytest.approx((18 + 20) / 2)


def test_two_rounds_take_as_long_as_their_messages_one_after_the_other():
    """Nothing is lost between them: where the uplink is the bottleneck, it is never idle."""
    link = LinkProfile("hand", compute_seconds=0.5)
    first = round_cost(
        link,
        RATES,
        uplink_bytes={0: MB},
        downlink_bytes={0: 0},
        compute_seconds={},
        refinement_bytes={0: MB},
    )
    second = round_cost(
        link, RATES, uplink_bytes={0: MB}, downlink_bytes={0: 0}, compute_seconds={}, backlog=first.backlog
    )
    assert first.seconds + second.seconds == pytest.approx(0.5 + 3 * 8)


def test_without_refinements_there_is_no_backlog():
    assert cost(uplink_bytes={0: MB, 1: MB}).backlog == {}


def test_refinements_alone_close_no_round():
    with pytest.raises(ConfigError, match="at least one client"):
        cost(uplink_bytes={}, refinement_bytes={0: MB})


# Losses

SETTINGS = {"loss": 0.3, "retransmissions": 0, "seed": 5}


def test_refinements_meet_losses_of_their_own():
    sizes = dict.fromkeys(range(40), 3000)
    first, second = (deliver(sizes, round=1, refinements=which, **SETTINGS) for which in (False, True))
    assert first.attempts == second.attempts == 1
    assert first.arrived != second.arrived
    assert second == deliver(sizes, round=1, refinements=True, **SETTINGS)
    assert second != deliver(sizes, round=2, refinements=True, **SETTINGS)
    assert 0 < len(second.arrived) < 40


def test_refinements_that_are_all_lost_are_not_sent_again():
    hopeless = SETTINGS | {"loss": 0.9, "retransmissions": 1}
    delivery = deliver({0: 60_000, 1: 60_000}, round=1, refinements=True, **hopeless)
    assert (delivery.arrived, delivery.attempts) == ((), 1)
    assert all(1500 <= sent < 60_000 for sent in delivery.air_bytes.values())


@pytest.mark.parametrize("loss", [0.0, 0.5])
def test_no_refinements_are_no_failure(loss):
    delivery = deliver({}, round=1, refinements=True, **(SETTINGS | {"loss": loss}))
    assert (delivery.arrived, delivery.air_bytes, delivery.attempts) == ((), {}, 1)


def test_without_loss_every_refinement_arrives():
    delivery = deliver({3: 10, 1: 4000}, round=1, refinements=True, **(SETTINGS | {"loss": 0.0}))
    assert (delivery.arrived, delivery.air_bytes) == ((1, 3), {3: 10, 1: 4000})
