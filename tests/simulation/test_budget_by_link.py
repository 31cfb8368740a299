"""budget_by_link: slow clients say less, in proportion, so that a round's uploads take no longer than the median's."""

import json
from pathlib import Path

import pytest
import yaml
from test_runner import rows

from fedfstq_hf.errors import ConfigError
from fedfstq_hf.recipe import load_recipe, validate
from fedfstq_hf.simulation.network import draw_rates
from fedfstq_hf.simulation.runner import Simulation

BUDGET = 325
LINK = {"name": "uneven", "uplink_mbps": 8.0, "spread": 0.5, "tail_fraction": 0.3, "tail_mbps": [1.0, 3.0]}
METHOD = {"codec": "topk", "codec_options": {"value_bits": 8}, "uplink_budget": BUDGET, "error_feedback": False}


@pytest.fixture
def recipe(tiny_recipe, tmp_path):
    def write(**method):
        settings = yaml.safe_load(Path(tiny_recipe).read_text())
        settings |= {"methods": {"even": METHOD, "uneven": METHOD | method}, "links": [LINK]}
        path = tmp_path / "links.yaml"
        path.write_text(yaml.safe_dump(settings))
        return path

    return write


@pytest.mark.parametrize("workers", [1, 2])
def test_payloads_go_by_the_rate_of_those_slower_than_the_median(recipe, tmp_path, workers):
    loaded = load_recipe(recipe(budget_by_link="uneven"), {"federation.rounds": 1})
    Simulation(loaded, tmp_path / "out", progress=False, workers=workers).run()
    even, uneven = (
        dict(zip(row["clients"], row["client_air_bytes"], strict=True))
        for row in rows(tmp_path / "out")
        if row["round"] == 1
    )
    [link] = loaded.links
    rates = draw_rates(link, loaded.federation.clients, 3).uplink / (link.uplink_mbps * 1e6)
    assert min(rates) < 0.4 < 1.0 < max(rates)
    headers = {client: BUDGET - payload_room(tmp_path / "out", client) for client in even}
    for client, size in uneven.items():
        room = (BUDGET - headers[client]) * min(1.0, rates[client])
        assert headers[client] + room - 8 < size <= headers[client] + room
        assert size == even[client] or rates[client] < 1.0


def payload_room(folder, client):
    """Bytes that the message of `client` under method `even` leaves to its payload, from the message itself."""
    from fedfstq_hf.codec import message

    [path] = folder.glob(f"runs/even/seed-3/mailbox/updates/000000/client-{client:04d}.safetensors")
    header, _ = message.unpack(path.read_bytes())
    return BUDGET - message.overhead(header, BUDGET)


def test_a_link_that_the_recipe_does_not_have_is_named_with_those_it_has(recipe):
    with pytest.raises(ConfigError, match=r"budget_by_link: 'fast' is none of the recipe's links: uneven"):
        validate(load_recipe(recipe(budget_by_link="fast")))


def test_without_a_budget_there_is_nothing_to_divide(recipe):
    with pytest.raises(ConfigError, match="budget_by_link divides uplink_budget among the clients; set that too"):
        load_recipe(recipe(budget_by_link="uneven", uplink_budget=None))


def test_it_stands_in_the_recipe_of_the_run(recipe, tmp_path):
    Simulation(load_recipe(recipe(budget_by_link="uneven"), {"federation.rounds": 1}), tmp_path / "out", progress=False)
    written = json.loads((tmp_path / "out/recipe.json").read_text())
    assert written["methods"]["uneven"]["budget_by_link"] == "uneven"
    assert written["methods"]["even"]["budget_by_link"] is None
