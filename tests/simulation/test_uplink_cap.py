"""uplink_cap: a client whose link carries less than its budget in the time that a message may take says less."""

from pathlib import Path

import pytest
import yaml
from test_runner import rows

from fedfstq_hf.codec import message
from fedfstq_hf.errors import ConfigError
from fedfstq_hf.recipe import load_recipe, validate
from fedfstq_hf.recipe.network import draw_rates
from fedfstq_hf.simulation.runner import Simulation

BUDGET = 325
SECONDS = 0.0008
LINK = {"name": "uneven", "uplink_mbps": 8.0, "spread": 0.5, "tail_fraction": 0.3, "tail_mbps": [2.85, 3.05]}
METHOD = {"codec": "topk", "codec_options": {"value_bits": 8}, "uplink_budget": BUDGET, "error_feedback": 0.0}


@pytest.fixture
def recipe(tiny_recipe, tmp_path):
    def write(**method):
        settings = yaml.safe_load(Path(tiny_recipe).read_text())
        settings |= {"methods": {"even": METHOD, "uneven": METHOD | method}, "links": [LINK]}
        path = tmp_path / "links.yaml"
        path.write_text(yaml.safe_dump(settings))
        return path

    return write


def test_no_message_takes_longer_than_it_may(recipe, tmp_path):
    loaded = load_recipe(recipe(uplink_cap=f"{SECONDS}s@uneven"), {"federation.rounds": 1})
    Simulation(loaded, tmp_path / "out", progress=False).run()
    even, uneven = (
        dict(zip(row["clients"], row["client_air_bytes"], strict=True))
        for row in rows(tmp_path / "out")
        if row["round"] == 1
    )
    [link] = loaded.links
    carried = dict(enumerate(SECONDS * draw_rates(link, loaded.federation.clients, 3).uplink / 8))
    assert min(carried.values()) < 0.95 * BUDGET < BUDGET < max(carried.values())
    for client, size in uneven.items():
        assert min(BUDGET, carried[client]) - 12 < size <= min(BUDGET, carried[client])
        assert size == even[client] or carried[client] < BUDGET


def test_where_the_header_alone_takes_too_long_the_payload_is_empty(recipe, tmp_path):
    loaded = load_recipe(recipe(uplink_cap="1e-9s@uneven"), {"federation.rounds": 1})
    Simulation(loaded, tmp_path / "out", progress=False).run()
    for path in (tmp_path / "out").glob("runs/uneven/seed-3/mailbox/updates/000000/*"):
        assert message.unpack(path.read_bytes())[1] == b""


def test_a_link_that_the_recipe_does_not_have_is_named_with_those_it_has(recipe):
    with pytest.raises(ConfigError, match=r"uplink_cap: 'fast' is none of the recipe's links: uneven"):
        validate(load_recipe(recipe(uplink_cap="1s@fast")))


def test_without_a_budget_there_is_nothing_to_lower(recipe):
    with pytest.raises(ConfigError, match="uplink_cap lowers uplink_budget where a link is slow; set that too"):
        load_recipe(recipe(uplink_cap="1s@uneven", uplink_budget=None))


@pytest.mark.parametrize(
    "cap", ["1s", "fast", "-1s@uneven", "0s@uneven", "infs@uneven", "1e999s@uneven", "1..2s@uneven", 3]
)
def test_a_cap_that_cannot_be_read_is_shown_with_one_that_can(recipe, cap):
    with pytest.raises(ConfigError, match=r"uplink_cap .*(such as 0\.5s@straggler-tail|must be text)"):
        load_recipe(recipe(uplink_cap=cap))
