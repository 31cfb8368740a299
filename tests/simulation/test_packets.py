"""Packets and their losses, by hand-made draws; and what a lossy round leaves in rows and residuals."""

import numpy as np
import pytest

from fedfstq_hf.errors import FedFSTQError
from fedfstq_hf.recipe.network import _transmit, deliver


class Draws:
    """Stands in for a generator: the draws are written down."""

    def __init__(self, *rows):
        self.rows = np.array(rows, dtype=float)

    def random(self, shape):
        assert self.rows.shape == shape
        return self.rows


def test_a_lost_packet_is_sent_again_and_counted_again():
    # 3100 bytes are packets of 1500, 1500 and 100; the second needs three tries, the last two: 1500 + 4500 + 200.
    draws = Draws([0.9, 0.0, 0.0], [0.1, 0.1, 0.9], [0.1, 0.9, 0.1])
    assert _transmit(3100, 0.2, 2, draws) == (6200, True)


def test_a_packet_given_up_ends_the_message():
    # The second packet is lost three times over: 1500 + 3 * 1500 are on the air, the last packet never is.
    draws = Draws([0.9, 0.0, 0.0], [0.1, 0.1, 0.1], [0.9, 0.9, 0.9])
    assert _transmit(3100, 0.2, 2, draws) == (6000, False)


def test_without_loss_every_byte_is_sent_once():
    delivery = deliver({3: 10, 1: 4000}, loss=0.0, retransmissions=3, seed=0, round=1)
    assert (delivery.arrived, delivery.air_bytes, delivery.attempts) == ((1, 3), {3: 10, 1: 4000}, 1)


def test_methods_meet_the_same_losses():
    """The first packets of a longer message are lost as those of a shorter one are."""
    for round in range(1, 30):
        settings = {"loss": 0.2, "retransmissions": 0, "seed": 5, "round": round}
        one, two = (deliver({7: size}, **settings) for size in (1500, 1500))
        assert one == two
        longer = deliver({7: 3000}, **settings)
        assert longer.attempts >= one.attempts
    assert deliver({7: 1500}, **{**settings, "seed": 6, "loss": 0.9}) != deliver({7: 1500}, **{**settings, "loss": 0.9})


def test_the_share_of_messages_lost_is_that_of_the_formula():
    # 10 packets, 20 % loss, no retransmission: a message survives with 0.8^10 = 0.107.
    whole = [_transmit(15_000, 0.2, 0, np.random.default_rng([1, client]))[1] for client in range(2000)]
    assert np.mean(whole) == pytest.approx(0.8**10, abs=0.02)


def test_a_round_that_loses_everything_is_sent_again():
    delivery = deliver({0: 15_000, 1: 15_000}, loss=0.5, retransmissions=0, seed=0, round=1)
    assert delivery.attempts > 1
    assert delivery.arrived
    assert min(delivery.air_bytes.values()) >= 1500 * delivery.attempts


def test_a_hopeless_link_says_what_to_change():
    with pytest.raises(FedFSTQError, match=r"--federation\.retransmissions"):
        deliver({0: 10_000_000}, loss=0.5, retransmissions=0, seed=0, round=1)
