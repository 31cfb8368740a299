"""`round:` budgets: what a round's messages share, so that each may say more where few come."""

from pathlib import Path

import yaml
from test_runner import rows

from fedfstq_hf.recipe import load_recipe
from fedfstq_hf.simulation.runner import Simulation

BUDGET = 840  # 280 bytes each where three come, 420 where two do: less than the whole update takes
METHOD = {"codec": "topk", "codec_options": {"value_bits": 8}, "error_feedback": 0.0}


def test_a_message_gets_what_the_last_rounds_messages_would_have_shared(tiny_recipe, tmp_path):
    settings = yaml.safe_load(Path(tiny_recipe).read_text())
    settings["methods"] = {"shared": METHOD | {"uplink_budget": f"round:{BUDGET}B"}}
    path = tmp_path / "shared.yaml"
    path.write_text(yaml.safe_dump(settings))
    loaded = load_recipe(path, {"federation.rounds": 6, "federation.dropout": 0.5})
    Simulation(loaded, tmp_path / "out", progress=False).run()
    expected = round(loaded.federation.clients_per_round / 2)
    seen = set()
    for row in rows(tmp_path / "out")[1:]:
        share = BUDGET // expected
        assert all(size <= share for size in row["client_air_bytes"])
        if expected > 1:
            assert all(size > share - 12 for size in row["client_air_bytes"])
            seen.add(share)
        expected = row["num_updates"]
    assert seen == {280, 420}, (
        "who drops out is drawn with the recipe's seed: choose one with rounds of two and of three"
    )
