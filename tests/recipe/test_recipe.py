import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fedfstq_hf import recipe as recipes
from fedfstq_hf.errors import ConfigError
from fedfstq_hf.recipe import Recipe, find_recipe, library, list_recipes, load_recipe, validate

MINIMAL = {"name": "small", "methods": {"fedavg": {"codec": "fp32"}}}


def _write(folder: Path, text: str) -> Path:
    path = folder / "own.yaml"
    path.write_text(text)
    return path


# The shipped recipes


@pytest.mark.parametrize("name", list_recipes())
def test_shipped_recipes_load_round_trip_and_run(name):
    recipe = load_recipe(name)
    assert recipe.name == name.rpartition("/")[2]
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert Recipe.from_dict(yaml.safe_load(yaml.safe_dump(recipe.to_dict()))) == recipe
    assert validate(recipe) == []
    if recipe.target.of == "fedavg":  # a study of something else names its own reference
        assert {"fedavg", "fstq"} <= set(recipe.methods)


@pytest.mark.parametrize("name", list_recipes())
def test_shipped_recipes_begin_with_their_manual(name):
    header = [line for line in find_recipe(name).read_text().splitlines() if line.startswith("#")]
    for word in ("# Needs", "# Run", "# Change", "# Takes", "# Measured"):
        assert any(line.startswith(word) for line in header), word
    assert any(f"fedfstq simulate {name}" in line for line in header)


def test_the_four_recipes_are_there():
    assert set(list_recipes()) >= {"quickstart", "fed_med", "fed_aya", "fed_code"}
    assert load_recipe("quickstart").model == "demo"


def test_the_override_in_each_manual_works():
    for name in list_recipes():
        line = next(line for line in find_recipe(name).read_text().splitlines() if line.startswith("# Change"))
        words = line.split("(")[0].split()[5:]
        load_recipe(name, {key.removeprefix("--"): value for key, value in zip(words[::2], words[1::2], strict=True)})


def test_recipes_are_found_by_name_path_and_habit(tmp_path, monkeypatch):
    path = _write(tmp_path, yaml.safe_dump(MINIMAL))
    monkeypatch.chdir(tmp_path)
    assert load_recipe(path).name == load_recipe("own.yaml").name == "small"
    # As typed in a checkout, from elsewhere.
    assert find_recipe("recipes/fed_med.yaml") == find_recipe("fed_med.yaml") == find_recipe("fed_med")


def test_recipes_of_an_installed_package_are_found(tmp_path, monkeypatch):
    package = tmp_path / "site-packages" / "fedfstq_hf"
    (package / "_recipes" / "evaluation").mkdir(parents=True)
    for name in ("one.yaml", "evaluation/two.yaml"):
        (package / "_recipes" / name).write_text(yaml.safe_dump(MINIMAL))
    monkeypatch.setattr(library.resources, "files", lambda _: package)
    assert list_recipes() == ["evaluation/two", "one"]
    assert find_recipe("evaluation/two") == package / "_recipes" / "evaluation" / "two.yaml"
    (package / "_recipes" / "one.yaml").unlink()
    (package / "_recipes" / "evaluation" / "two.yaml").unlink()
    with pytest.raises(ConfigError, match="has no recipes"):
        find_recipe("one")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fedmed", "did you mean 'fed_med'"),
        ("no/such/file.yaml", "no recipe file no/such/file.yaml"),
        (".", "is a folder"),
    ],
)
def test_what_cannot_be_found_says_so(name, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe(name)


# Strictness


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"trainig": {}}, r"unknown key 'trainig' in recipe; did you mean 'training'"),
        ({"training": {"learning_rat": 1.0}}, r"'learning_rat' in recipe\.training; did you mean 'learning_rate'"),
        (
            {"training": {"learning_rate": "fast"}},
            r"learning_rate must be a number, got 'fast' \(str\)",
        ),
        ({"training": {"learning_rate": True}}, r"must be a number, got True \(bool\)"),
        ({"training": {"learning_rate": -1.0}}, r"recipe\.training\.learning_rate must be above 0"),
        ({"training": {"local_steps": 1.5}}, r"local_steps must be a whole number, got 1\.5"),
        ({"training": {"optimizer_state": "new"}}, r"must be one of fresh, kept, got 'new'"),
        ({"training": {"rho": 1.0}}, r"rho must lie in \[0, 1\), got 1\.0"),
        ({"training": 3}, r"recipe\.training must be a mapping"),
        (
            {"federation": {"clients": 3, "clients_per_round": 4}},
            r"must be at most clients = 3, got 4",
        ),
        ({"federation": {"dropout": 1.0}}, r"dropout must lie in \[0, 1\)"),
        ({"federation": {"partition": "even"}}, r"partition must be one of dirichlet, iid, natural"),
        ({"lora": {"init_lora_weights": "pissa"}}, r"change the base model"),
        ({"lora": {"target_modules": [1]}}, r"target_modules must be text or a list"),
        ({"lora": {"rank": 4}}, r"unknown key 'rank' in recipe\.lora"),
        ({"data": {"format": "csv"}}, r"recipe\.data\.format must be one of demo"),
        ({"data": {"path": "x.jsonl"}}, r"path demo goes with format demo"),
        ({"data": {"train_limit": 0}}, r"train_limit must be at least 1 or null"),
        ({"links": ["lte-20mbs"]}, r"recipe\.links\[0\]: unknown link profile 'lte-20mbs'; did you mean 'lte-20mbps'"),
        (
            {"links": [{"name": "a", "uplink": 3}]},
            r"in recipe\.links\[0\]; did you mean 'uplink_mbps'",
        ),
        ({"links": [{"uplink_mbps": 3}]}, r"recipe\.links\[0\] lacks the key 'name'"),
        ({"links": ["lte-20mbps", {"name": "lte-20mbps"}]}, r"links must be distinct"),
        ({"links": []}, r"links must name at least one"),
        ({"seeds": 0}, r"recipe\.seeds must be how many seeds"),
        ({"seeds": [0, 0]}, r"seeds must be distinct"),
        ({"seeds": [-1]}, r"seeds must be at least one whole number"),
        ({"seeds": ["a"]}, r"recipe\.seeds\[0\] must be a whole number"),
        ({"methods": {}}, r"methods must name at least one"),
        ({"methods": {"a": {"codek": "fp32"}}}, r"unknown key 'codek' in recipe\.methods\.a; did you mean 'codec'"),
        (
            {"methods": {"a": {"error_feedback": 2.0}}},
            r"error_feedback must be a number of at least 0 and at most 1, not 2\.0",
        ),
        ({"methods": {"a": {"lora": {"rank": 2}}}}, r"unknown key 'rank' in methods\.a\.lora"),
        ({"methods": {"a": {"lora": {"r": 0}}}}, r"methods\.a\.lora\.r must be above 0"),
        ({"methods": {"a": {"learning_rate": 0.0}}}, r"recipe\.methods\.a\.learning_rate must be above 0"),
        ({"methods": {"a": {"weights": "bytes"}}}, r"weights must be one of examples, uniform, precision"),
        (
            {"methods": {"a": {"weights": "precision", "scaffold": True}}},
            r"with control variates all clients weigh",
        ),
        ({"methods": {"a": {"uplink_budget": 0}}}, r"uplink_budget must be a whole number of at least 1"),
        ({"methods": {"a": {"uplink_budget": [1]}}}, r"uplink_budget must be a whole number or text or null"),
        ({"methods": {"a": {"server": {"lr": 0.0}}}}, r"recipe\.methods\.a\.server\.lr must be a number above 0"),
        (
            {"methods": {"a": {"server": {"final_lr": 0}}}},
            r"recipe\.methods\.a\.server\.final_lr must be a number above 0",
        ),
        ({"methods": {"a": {"server": "Adam"}}}, r"server must be a mapping such as"),
        ({"evaluation": {"metric": "rouge"}}, r"metric must be one of eval_loss, exact_match"),
        ({"target": {"fraction": 1.5}}, r"fraction must lie in \[0, 1\]"),
    ],
)
def test_wrong_recipes_name_the_place_and_the_remedy(section, message):
    with pytest.raises(ConfigError, match=message):
        Recipe.from_dict({**MINIMAL, **section})


def test_a_recipe_needs_a_name_and_methods():
    with pytest.raises(ConfigError, match="lacks the key 'methods'"):
        Recipe.from_dict({"name": "x"})


def test_errors_name_the_file(tmp_path):
    path = _write(tmp_path, "name: x\nmethods: {a: {}}\ntraining: {epochs: 3}\n")
    with pytest.raises(ConfigError, match=r"in recipe own\.yaml: training"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: [", "recipe own.yaml is not valid YAML"),
        ("name: a\nname: b\n", r"own\.yaml: key 'name' stands twice in one mapping \(line 2\)"),
        ("training:\n  rho: 0.1\n  rho: 0.2\n", "'rho' stands twice"),
        ("- a\n", "must be a mapping"),
        ("", "must be a mapping"),
    ],
)
def test_malformed_files(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe(_write(tmp_path, text))


def test_exponents_without_a_dot_are_numbers(tmp_path):
    text = yaml.safe_dump(MINIMAL) + "training: {learning_rate: 1e-3, adam_epsilon: 1E-8, weight_decay: -0}\n"
    training = load_recipe(_write(tmp_path, text)).training
    assert (training.learning_rate, training.adam_epsilon) == (1e-3, 1e-8)


# Overrides


def test_overrides_by_path_and_short_name():
    recipe = load_recipe(
        "fed_med",
        {
            "model": "../models/1e3",
            "data": "../data/x.jsonl",
            "rounds": "3",
            "clients": 8,
            "alpha": "1.0",
            "seeds": "3",
            "methods": "fstq,fedavg",
            "links": "straggler-tail",
            "training.learning_rate": "1e-4",
            "lora.target_modules": "[q_proj, v_proj]",
            "methods.fstq.server": "{optimizer: Adam, lr: 0.01, betas: [0.9, 0.99]}",
            "methods.fstq.uplink_budget": "5s@2Mbps",
            "methods.fedavg.codec_options.bits": "8",
        },
    )
    assert (recipe.model, recipe.data.path, recipe.data.format) == ("../models/1e3", "../data/x.jsonl", "fed_med")
    assert (recipe.federation.rounds, recipe.federation.clients, recipe.federation.alpha) == (3, 8, 1.0)
    assert recipe.seeds == (0, 1, 2)
    assert list(recipe.methods) == ["fstq", "fedavg"]
    assert [link.name for link in recipe.links] == ["straggler-tail"]
    assert recipe.training.learning_rate == 1e-4
    assert recipe.lora.target_modules == ["q_proj", "v_proj"]
    server = recipe.methods["fstq"].server
    assert (server.optimizer, server.lr, server.options) == ("Adam", 0.01, {"betas": [0.9, 0.99]})
    assert recipe.methods["fstq"].uplink_budget == "5s@2Mbps"
    assert recipe.methods["fedavg"].codec_options == {"bits": 8}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"methods.fst.codec": "fp32"}, "unknown key 'fst' in methods; did you mean 'fstq'"),
        ({"methods": "fedavg,fst"}, "unknown key 'fst' in methods"),
        ({"methods": ""}, "unknown key '' in methods"),
        ({"model.dtype": "float32"}, "override model.dtype: model is .* not a section; type --model VALUE"),
        ({"training.learning_rate": "[1"}, "override training.learning_rate=.* is not valid YAML"),
        ({"federation.round": "3"}, "did you mean 'rounds'"),
        ({"round": "3"}, "unknown key 'round'"),
    ],
)
def test_wrong_overrides(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe("fed_med", overrides)


def test_overrides_leave_the_mapping_alone():
    mapping = {"methods": {"a": {"codec": "fp32"}}, "training": {"rho": 0.5}}
    recipes.apply_overrides(mapping, {"training.rho": "0.1", "methods.a.codec": "fp16"})
    assert mapping == {"methods": {"a": {"codec": "fp32"}}, "training": {"rho": 0.5}}


@given(
    st.lists(st.integers(0, 10**6), min_size=1, max_size=4, unique=True),
    st.floats(1e-6, 1.0),
    st.one_of(st.none(), st.floats(0.01, 1.0)),
    st.one_of(st.none(), st.integers(1, 10**9), st.just("96kB")),
)
def test_any_recipe_round_trips(seeds, rate, feedback, budget):
    recipe = Recipe.from_dict(
        {
            **MINIMAL,
            "seeds": seeds,
            "training": {"learning_rate": rate},
            "methods": {"m": {"error_feedback": feedback, "uplink_budget": budget, "server": {"momentum": rate}}},
            "links": ["straggler-tail", {"name": "own", "tail_mbps": [0.1, rate + 1]}],
        }
    )
    assert Recipe.from_dict(yaml.safe_load(yaml.safe_dump(recipe.to_dict()))) == recipe


# What the sections turn into


def test_sections_become_library_arguments():
    recipe = load_recipe("fed_med", {"lora.use_rslora": "true", "training.weight_decay": "0.1"})
    lora = recipe.lora.peft_kwargs()
    assert (lora["r"], lora["lora_alpha"], lora["task_type"], lora["use_rslora"]) == (16, 32, "CAUSAL_LM", True)
    training = recipe.training.trainer_kwargs()
    assert training["weight_decay"] == 0.1
    assert not {"local_steps", "optimizer_state", "refresh_steps", "rho"} & set(training)
    assert (recipe.methods["fstq"].error_feedback, recipe.methods["paper"].error_feedback) == (None, 0)
    assert recipe.evaluation.higher_is_better is False


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"methods.fstq.codec": "fstk"}, r"methods\.fstq\.codec: .*fstq"),
        ({"methods.fstq.codec_options.densitee": "0.1"}, r"methods\.fstq\.codec: .*densit"),
        ({"methods.fstq.uplink_budget": "96 kilo"}, r"methods\.fstq\.uplink_budget"),
        ({"methods.fstq.server.optimizer": "Adamm"}, r"methods\.fstq\.server: unknown server\.optimizer 'Adamm'; did"),
        ({"methods.fstq.server.momentun": "0.9"}, r"methods\.fstq\.server: .*momentun"),
        ({"training.optim": "adamx"}, r"training: .*adamx"),
        ({"training.lr_scheduler_type": "steep"}, r"training: .*steep"),
        ({"data": "nowhere.jsonl"}, r"data\.path: there is no file nowhere\.jsonl"),
    ],
)
def test_validate_asks_the_libraries(overrides, message):
    with pytest.raises(ConfigError, match=message):
        validate(load_recipe("fed_med", overrides))


def test_validate_reports_everything_at_once():
    with pytest.raises(ConfigError, match=r"(?s)fstk.*nowhere"):
        validate(load_recipe("fed_med", {"methods.fstq.codec": "fstk", "data": "nowhere.jsonl"}))


def test_validate_notes_a_missing_reference():
    assert "no target and no ratios" in validate(load_recipe("quickstart", {"methods": "fstq"}))[0]


def test_loading_a_recipe_needs_no_torch():
    code = "import sys, fedfstq_hf.recipe as r; r.load_recipe('fed_med'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
