import math

import numpy as np
import pytest

from fedfstq_hf.errors import ConfigError
from fedfstq_hf.recipe.network import (
    PROFILES,
    LinkProfile,
    LinkRates,
    draw_rates,
    get_link,
    round_cost,
)

RATES = LinkRates(uplink=np.array([1e6, 8e6, 2e6]), downlink=np.array([8e6, 8e6, 16e6]))
TRAFFIC = {
    "uplink_bytes": {0: 125_000, 2: 1_000_000},
    "downlink_bytes": {0: 1_000_000, 2: 2_000_000},
    "compute_seconds": {0: 3.0, 2: 1.5},
}


def test_round_lasts_as_long_as_its_slowest_client():
    # client 0: 8e6/8e6 + 3 + 1e6/1e6 = 5 s; client 2: 16e6/16e6 + 1.5 + 8e6/2e6 = 6.5 s; the server adds 0.25 s.
    profile = LinkProfile("hand", server_seconds=0.25)
    assert round_cost(profile, RATES, **TRAFFIC).seconds == pytest.approx(6.75)
    assert round_cost(profile, RATES, **TRAFFIC).straggler == 2


def test_energy_is_compute_plus_transmission():
    # client 0: 4 W * 3 s + 5 W * 1 s = 17 J; client 2, the straggler: 4 W * 1.5 s + 5 W * 4 s = 26 J.
    cost = round_cost(LinkProfile("hand", transmit_watts=5.0), RATES, **TRAFFIC)
    assert cost.energy_straggler == pytest.approx(26)
    assert cost.energy_mean == pytest.approx((17 + 26) / 2)


def test_energy_defaults_give_the_papers_figures():
    # 1024 MB and 138 MB at 20 Mbit/s: the paper's 839.2 J and 133.8 J at 5.00 s and 5.85 s of compute.
    profile, rates = get_link("lte-20mbps"), draw_rates(get_link("lte-20mbps"), 1, 0)
    for size, compute, joules in ((1_024_000_000, 5.0, 839.2), (138_000_000, 5.85, 133.8)):
        cost = round_cost(profile, rates, uplink_bytes={0: size}, downlink_bytes={0: 0}, compute_seconds={0: compute})
        assert cost.energy_mean == pytest.approx(joules, abs=0.05)


def test_fixed_compute_replaces_the_measured_one():
    profile = LinkProfile("hand", compute_seconds=10.0)
    assert round_cost(profile, RATES, **TRAFFIC).seconds == pytest.approx(1 + 10 + 4)


def test_a_round_without_survivors_is_refused():
    with pytest.raises(ConfigError, match="at least one client"):
        round_cost(get_link("lte-20mbps"), RATES, uplink_bytes={}, downlink_bytes={}, compute_seconds={})


def test_controlled_link_is_the_same_for_everyone():
    rates = draw_rates(get_link("lte-20mbps"), 7, seed=3)
    assert rates.uplink == pytest.approx(np.full(7, 20e6))
    assert rates.downlink == pytest.approx(np.full(7, 100e6))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("num_clients", [1, 10, 57])
def test_straggler_tail_has_exactly_its_share(num_clients, seed):
    rates = draw_rates(get_link("straggler-tail"), num_clients, seed)
    slow = rates.uplink < 2e6 * (1 - 1e-9)
    assert slow.sum() == math.ceil(0.2 * num_clients)
    assert (rates.uplink[slow] >= 0.5e6 * (1 - 1e-9)).all()


def test_rates_depend_on_the_seed_alone():
    profile = get_link("straggler-tail")
    assert (draw_rates(profile, 20, 1).uplink == draw_rates(profile, 20, 1).uplink).all()
    assert (draw_rates(profile, 20, 1).uplink != draw_rates(profile, 20, 2).uplink).any()


def test_unknown_link_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'straggler-tail'"):
        get_link("stragler-tail")
    assert set(PROFILES) == {"lte-20mbps", "straggler-tail", "link-1x", "link-10x", "link-100x"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"uplink_mbps": 0},
        {"uplink_mbps": math.nan},
        {"tail_fraction": 1.5},
        {"tail_mbps": (2.0, 0.5)},
        {"compute_seconds": -1.0},
        {"spread": -0.1},
        {"downlink_ratio": math.nan},
    ],
)
def test_profiles_refuse_what_makes_no_sense(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        LinkProfile("wrong", **wrong)


def test_an_upload_ratio_sets_the_rates():
    # 1,000,000 numbers are 32 Mbit; 10 times 2 s of compute makes 20 s, 1.6 Mbit/s. The tail stays at 5 to 20 %.
    profile = LinkProfile("hand", uplink_mbps=10.0, tail_mbps=(0.5, 2.0), compute_seconds=2.0, upload_ratio=10.0)
    resolved = profile.for_adapter(1_000_000)
    assert resolved.uplink_mbps == pytest.approx(1.6)
    assert resolved.tail_mbps == pytest.approx((0.08, 0.32))
    assert resolved.for_adapter(5) == resolved
    cost = round_cost(
        resolved,
        draw_rates(resolved, 1, 0),
        uplink_bytes={0: 4_000_000},
        downlink_bytes={0: 0},
        compute_seconds={0: 9.0},
    )
    assert cost.seconds == pytest.approx(2.0 + 20.0)


def test_ratio_profiles_cost_the_same_at_any_size_of_adapter():
    for name, ratio in (("link-1x", 1), ("link-10x", 10), ("link-100x", 100)):
        for size in (1000, 50_000):
            profile = get_link(name).for_adapter(size)
            rates = draw_rates(profile, 10_001, seed=0)
            assert np.median(8 * 4 * size / rates.uplink) == pytest.approx(ratio, rel=0.3)
            assert rates.downlink == pytest.approx(5 * rates.uplink)


def test_an_upload_ratio_needs_a_compute_time():
    with pytest.raises(ConfigError, match="upload_ratio must be a number above 0 beside compute_seconds"):
        LinkProfile("hand", upload_ratio=10.0)
