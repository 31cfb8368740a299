"""The table of a method's switches: what passes, what is refused, and one way through JSON."""

import dataclasses
import json

import pytest

from fedfstq_hf import FedFSTQConfig
from fedfstq_hf.codec import codec_names, get_codec
from fedfstq_hf.errors import ConfigError
from fedfstq_hf.federation.spec import FederationSpec
from fedfstq_hf.methods import LocalSwitches, MethodSettings, Row, ServerSettings, feedback_decay
from fedfstq_hf.ranges import Number, OneOf
from fedfstq_hf.recipe.sections import RecipeMethod

SWITCHES = {
    item.name: item.metadata["help"]
    for item in dataclasses.fields(MethodSettings)
    if isinstance(item.metadata["help"], Row)
}
ON = {
    "codec_options": {"bits": 0.5},
    "uplink_budget": "1kB",
    "refinement_budget": "2kB",
    "error_feedback": 0.5,
    "objective": "hard",
    "token_keep_ratio": 0.25,
    "fisher": "adam",
    "fisher_objective": "filtered-only",
    "proximal_mu": 0.1,
    "scaffold": True,
    "learned_binarisation": True,
    "max_staleness": 2,
    "freeze_a": True,
    "weights": "precision",
}


def test_every_switch_has_its_row():
    for name, row in SWITCHES.items():
        assert isinstance(row, Row), name
        assert row.endswith("."), name
        for other in (*row.excludes, *filter(None, [row.needs.partition(":")[0]])):
            assert other in SWITCHES, (name, other)


def test_the_spec_has_few_fields_of_its_own():
    assert len(dataclasses.fields(FederationSpec)) <= 25


@pytest.mark.parametrize(
    ("name", "other"), [(name, other) for name, row in SWITCHES.items() for other in row.excludes], ids=str
)
def test_what_excludes_each_other_is_refused_and_either_alone_is_not(name, other):
    extra = {
        "fisher_objective": {"objective": "hard"},
        "learned_binarisation": {"codec": "fedbat"},
        "error_feedback": {"codec": "topk"},
    }
    with pytest.raises(ConfigError, match=rf"{name} \(.*\) and {other} \(.*\) cannot be combined"):
        MethodSettings(**{name: ON[name], other: ON[other]}, **extra.get(other, {}))
    for alone in (name, other):
        assert getattr(MethodSettings(**{alone: ON[alone]}, **extra.get(alone, {})), alone) == ON[alone]


def test_weights_exclude_scaffold_only_where_they_look_at_noise():
    assert MethodSettings(weights="uniform", scaffold=True).weights == "uniform"


@pytest.mark.parametrize(
    ("range", "good", "bad"),
    [
        (Number(0, 1, above=True), (1e-9, 1), (0, 1.1, True, float("nan"), "1")),
        (Number(0, 1, below=True), (0, 0.999), (1, -0.1)),
        (OneOf(("a", "b")), ("a",), ("c", None, ["a"])),
    ],
    ids=["above", "below", "one of"],
)
def test_ranges(range, good, bad):
    for value in good:
        range.check("x", value)
    for value in bad:
        with pytest.raises(ConfigError, match=r"^x must be "):
            range.check("x", value)


def test_error_feedback_follows_from_the_codec():
    for name in codec_names():
        codec = get_codec(name)
        given = {"codec": name, "unbiased": codec.unbiased}
        assert feedback_decay(None, **given) == (0.0 if codec.unbiased else 1.0)
        assert feedback_decay(0, **given) == 0.0
        if codec.unbiased:
            with pytest.raises(ConfigError, match=f"error_feedback 0.5 would diverge with codec '{name}'"):
                feedback_decay(0.5, **given)
        else:
            assert feedback_decay(0.5, **given) == 0.5


def test_a_method_is_the_same_after_json_and_a_recipe_s_extras_stay_in_the_recipe():
    method = RecipeMethod(uplink_budget="1kB", uplink_cap="1s@lte-20mbps", server={"optimizer": "Adam", "lr": 0.1})
    shared = MethodSettings.from_dict(json.loads(json.dumps(method.to_dict())))
    assert shared == method.shared
    assert shared.server == ServerSettings(optimizer="Adam", lr=0.1)
    assert not hasattr(shared, "uplink_cap")
    with pytest.raises(ConfigError, match="method has no switch 'uplink_cap'; known: "):
        MethodSettings.from_dict({"uplink_cap": "1s@lte-20mbps"})
    with pytest.raises(ConfigError, match="method must be a mapping"):
        MethodSettings.from_dict([1])


def test_a_client_s_own_settings_have_the_same_rows():
    mine = {item.name for item in dataclasses.fields(LocalSwitches)}
    assert mine <= {item.name for item in dataclasses.fields(FedFSTQConfig)}
    with pytest.raises(ConfigError, match="objective must be one of full, hard, soft, unbiased, not 'soften'"):
        FedFSTQConfig(objective="soften")
