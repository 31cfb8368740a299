"""Settings of refinements: what is refused, in recipes, specs, configs and by clients, and what is told about them."""

from pathlib import Path

import pytest
import torch
import yaml
from specs import flat_spec
from tiny import make_arguments, make_tiny_data, make_tiny_model
from typer.testing import CliRunner

from fedfstq_hf import FedFSTQConfig, FedFSTQTrainer
from fedfstq_hf.cli import app
from fedfstq_hf.codec import Schema, get_codec, message
from fedfstq_hf.codec.budget import MessageBudget, open_refinement_budget
from fedfstq_hf.errors import BudgetError, ConfigError
from fedfstq_hf.federation.record import RoundRecord
from fedfstq_hf.federation.spec import FederationSpec
from fedfstq_hf.methods import MethodSettings
from fedfstq_hf.recipe import load_recipe, validate
from fedfstq_hf.recipe.sections import RecipeMethod, TimeCap
from fedfstq_hf.running.client_file import load_client_file
from tests.trainer.small_federation import found, served, settings_of

REFINED = {"refinement_budget": "0.4bpp", "preview_step": 0.5}


# The switches


def check(**given):
    MethodSettings(**({"refinement_budget": "0.4bpp"} | given))


@pytest.mark.parametrize("step", [0, -0.5, 1.5, True, "0.5", None, float("nan")])
def test_a_preview_step_is_a_share_of_the_server_s_step(step):
    with pytest.raises(ConfigError, match="preview_step must be a number above 0 and at most 1"):
        check(preview_step=step)


@pytest.mark.parametrize("step", [1e-6, 0.5, 1, 1.0])
def test_any_share_above_0_is_taken(step):
    assert check(preview_step=step) is None


@pytest.mark.parametrize(
    ("switch", "value"), [("preview_step", 0.5), ("preview_correction", 0.6), ("preview_rounds", 3)]
)
def test_what_is_about_previews_needs_refinements(switch, value):
    assert check(**{switch: value}) is None
    with pytest.raises(ConfigError, match=f"{switch} is {value}, but needs refinement_budget: set that too, such as"):
        check(refinement_budget=None, **{switch: value})
    assert check(refinement_budget=None, error_feedback=1.0, codec="topk", scaffold=True) is None


@pytest.mark.parametrize("share", [-0.1, 1.1, True, "0.5", None, float("nan")])
def test_a_preview_correction_is_a_share(share):
    with pytest.raises(ConfigError, match=r"preview_correction must be a number of at least 0 and at most 1 .*, not "):
        check(preview_correction=share)


@pytest.mark.parametrize("rounds", [0, -1, True, 2.0, "3"])
def test_preview_rounds_are_a_number_of_rounds(rounds):
    with pytest.raises(ConfigError, match="preview_rounds must be a whole number of at least 1, not"):
        check(preview_rounds=rounds)


@pytest.mark.parametrize(
    "other", [{"error_feedback": 1.0}, {"error_feedback": 0.5}, {"scaffold": True}, {"max_staleness": 1}]
)
def test_what_does_not_go_together_with_refinements(other):
    with pytest.raises(ConfigError, match=rf"refinement_budget .* and {next(iter(other))} .* cannot be combined"):
        check(codec="topk", **other)


# Methods and recipes


def method(**changes):
    return RecipeMethod(**(REFINED | changes))


def test_a_method_has_its_second_budget_and_cap():
    settings = method(refinement_cap="0.5s@straggler-tail")
    assert settings.refinement_time_cap == TimeCap(0.5, "straggler-tail")
    assert settings.time_cap is None
    assert RecipeMethod().refinement_budget is RecipeMethod().refinement_time_cap is None


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"error_feedback": 1.0}, "refinement_budget .* and error_feedback .* cannot be combined"),
        ({"refinement_budget": None}, "preview_step is 0.5, but needs refinement_budget"),
        (
            {"refinement_budget": None, "preview_step": 1.0, "refinement_cap": "1s@lte-20mbps"},
            "refinement_cap lowers refinement_budget where a link is slow; set that too, such as 0.4bpp",
        ),
    ],
)
def test_a_method_that_makes_no_sense_is_refused(changes, match):
    with pytest.raises(ConfigError, match=match):
        method(**changes)


@pytest.mark.parametrize("cap", ["1s", "fast", "-1s@uneven", "0s@uneven", "infs@uneven", "1..2s@uneven"])
def test_a_cap_that_cannot_be_read_is_shown_with_one_that_can(cap):
    with pytest.raises(ConfigError, match=rf"^refinement_cap is '{cap}'; .* such as 0\.5s@straggler-tail$"):
        method(refinement_cap=cap)


@pytest.fixture
def recipe(tiny_recipe, tmp_path):
    def write(**changes):
        settings = yaml.safe_load(Path(tiny_recipe).read_text())
        settings["methods"] = {"fstq": {"codec": "topk"} | REFINED | changes}
        path = tmp_path / "refined.yaml"
        path.write_text(yaml.safe_dump(settings | {"links": ["lte-20mbps"]}))
        return load_recipe(path)

    return write


@pytest.mark.parametrize("budget", [480, "96kB", "round:1bpp", "ramp:0.1bpp..0.4bpp", "late:0.1bpp..0.4bpp"])
def test_a_recipe_takes_budgets_of_known_sizes(recipe, budget):
    loaded = recipe(refinement_budget=budget, refinement_cap="1s@lte-20mbps")
    validate(loaded)
    assert loaded.to_dict()["methods"]["fstq"]["refinement_budget"] == budget


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"refinement_cap": "1s@fast"}, "refinement_cap: 'fast' is none of the recipe's links: lte-20mbps"),
        ({"refinement_budget": "auto"}, "refinement_budget 'auto' cannot follow the loss: give a size, such as 0.4bpp"),
        ({"refinement_budget": "round:auto:0.1bpp..1bpp"}, "refinement_budget 'round:auto:.*' cannot follow the loss"),
        ({"refinement_budget": "96 apples"}, "refinement_budget: uplink budget '96 apples' cannot be read"),
    ],
)
def test_a_recipe_that_would_not_run_is_refused(recipe, changes, match):
    with pytest.raises(ConfigError, match=rf"methods\.fstq\.{match}|methods\.fstq\.refinement_budget: {match}"):
        validate(recipe(**changes))


# Budgets


def test_a_refinement_budget_is_that_of_the_round():
    budget = open_refinement_budget("late:100B..400B", 1000)
    assert [budget.take(round, 4, carried={})[0] for round in range(4)] == [100, 100, 100, 400]
    assert open_refinement_budget(None, 1000) == MessageBudget()


# Specs


def spec(**changes):
    settings = {"rounds": 3, "local_steps": 1, "max_message_bytes": 9999} | REFINED | changes
    return flat_spec(name="n", model="m", base_fingerprint={}, schema="ab" * 32, **settings)


def test_a_spec_says_which_rounds_have_refinements():
    assert [spec().refines(round) for round in range(3)] == [True, True, False]
    assert [spec(rounds=1).refines(0), spec(refinement_budget=None, preview_step=1.0).refines(0)] == [False, False]
    assert FederationSpec.from_json(spec(salt="x").to_json()) == spec(salt="x")


@pytest.mark.parametrize(("given", "refined"), [(1, 1), (2, 2), (3, 3), (4, 3), (100, 3)])
def test_a_spec_says_after_which_round_there_are_no_more_previews(given, refined):
    limited = spec(rounds=4, preview_rounds=given)
    assert [limited.refines(round) for round in range(4)] == [round < refined for round in range(4)]
    assert FederationSpec.from_json(limited.to_json()) == limited


# Clients


def test_a_client_s_own_budget_is_checked_and_kept(tmp_path):
    config = FedFSTQConfig(refinement_budget="5s@2Mbps")
    config.save_pretrained(tmp_path)
    assert FedFSTQConfig.from_pretrained(tmp_path) == config
    assert FedFSTQConfig().refinement_budget is None
    with pytest.raises(BudgetError, match="refinement_budget 'auto' cannot follow the loss"):
        FedFSTQConfig(refinement_budget="auto")
    with pytest.raises(ConfigError, match="'96 apples' cannot be read"):
        FedFSTQConfig(refinement_budget="96 apples")


def test_a_client_file_may_have_one(tmp_path):
    path = tmp_path / "client.yaml"
    path.write_text("mailbox: box\nclient_id: a\ndata: {path: rows.jsonl}\nrefinement_budget: 1bpp\n")
    assert load_client_file(path).refinement_budget == "1bpp"


def trainer(mailbox, folder, **settings):
    return FedFSTQTrainer(
        model=make_tiny_model(),
        args=make_arguments(folder),
        train_dataset=make_tiny_data(4),
        federation=settings_of(mailbox, **settings),
    )


def test_a_client_that_sets_one_in_a_federation_without_refinements_is_told(tmp_path):
    mailbox = found(tmp_path / "box", make_tiny_model())
    with pytest.raises(ConfigError, match=r"The federation at .*box has no refinements: leave refinement_budget out\."):
        trainer(mailbox, tmp_path / "out", refinement_budget=900).train()


@pytest.mark.parametrize(("own", "size"), [({}, 900), ({"refinement_budget": 700}, 700)], ids=["the spec's", "its own"])
def test_a_trainer_sends_both_messages_within_its_budgets(tmp_path, own, size):
    settings = {"codec": "topk", "error_feedback": 0.0, "uplink_budget": 400, "refinement_budget": 900}
    mailbox = found(tmp_path / "box", make_tiny_model(), preview_step=0.5, **settings)
    with served(mailbox):
        trainer(mailbox, tmp_path / "out", **own).train()
    (first,), (last,) = (mailbox.list_updates(round) for round in (0, 1))
    (second,) = mailbox.list_updates(0, refinements=True)
    assert 380 < first.num_bytes <= 400
    assert all(size - 20 < ref.num_bytes <= size for ref in (second, last))
    record = RoundRecord.from_json(mailbox.read(2, "round.json"))
    assert [entry.client_id for entry in record.refinements] == ["a"]


# What is told about a refinement


def refinement():
    delta = {"x": torch.tensor([[1.0, 0.0], [0.0, -2.0]])}
    schema = Schema.from_state_dict(delta)
    header = message.Header(3, "a", 7, "ab" * 32, schema.fingerprint, "fp32", message.REFINEMENT_PARAMS)
    return message.pack(header, get_codec("fp32").encode(delta).payload), schema


def test_inspect_reads_a_refinement_matrix_by_matrix():
    data, schema = refinement()
    info = message.inspect(data, schema)
    assert [(matrix.name, matrix.size, matrix.sent) for matrix in info.matrices] == [("x", 4, 2)]
    assert info.header.params == {"refinement": True}
    assert "2 of 4 coordinates (50.00 %)" in str(info)


def test_the_command_reads_one_too(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(refinement()[0])
    shown = CliRunner().invoke(app, ["inspect", str(path)])
    assert shown.exit_code == 0
    assert "round 3 from a (7 examples), codec fp32" in shown.output
