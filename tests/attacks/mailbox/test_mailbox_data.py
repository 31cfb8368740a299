"""Which file and which columns are trained on or evaluated: the client's own decision, whatever a mailbox says."""

import dataclasses
import json
import types

import pytest
from light import make_spec
from tiny_workload import make_recipe

from fedfstq_hf.errors import ConfigError
from fedfstq_hf.recipe import Recipe
from fedfstq_hf.running.client_file import own_data
from fedfstq_hf.running.foundation import make_spec as recipe_spec
from fedfstq_hf.workloads import DataConfig, load_texts

WHERE = "data of client a"


@pytest.fixture
def notes(tmp_path):
    path = tmp_path / "notes.jsonl"
    row = {"prompt": "note", "answer": "ok", "question": "q", "context": "c", "long_answer": "Jane Roe, SSN 123"}
    path.write_text(json.dumps(row) + "\n")
    return str(path)


@pytest.mark.parametrize(
    "name", sorted({field.name for field in dataclasses.fields(DataConfig)} - {"format", "max_length"})
)
def test_a_spec_carries_nothing_that_chooses_among_a_clients_data(name):
    with pytest.raises(ConfigError, match=f"data.{name} is each client's own decision"):
        make_spec(data={name: "x"})


def test_max_length_is_bounded():
    for wrong in (7, 2**20 + 1, "256", True):
        with pytest.raises(ConfigError, match=r"data\.max_length must be"):
            make_spec(data={"max_length": wrong})


def test_no_path_of_the_founder_is_published(tmp_path, monkeypatch):
    recipe = Recipe.from_dict(make_recipe(tmp_path / "secret-project"))
    schema = types.SimpleNamespace(fingerprint="0" * 64, num_params=10)
    tokenizer = types.SimpleNamespace(get_vocab=dict)
    config = types.SimpleNamespace(base_model_name_or_path="demo")
    model = types.SimpleNamespace(peft_config={"default": config})
    view = types.SimpleNamespace(schema=schema, name="default")
    founding = types.SimpleNamespace(model=model, view=view, tokenizer=tokenizer)
    monkeypatch.setattr("fedfstq_hf.running.foundation.base_fingerprint", lambda model: {})
    spec = recipe_spec(recipe, "fstq", founding, seed=0, min_clients=1)
    assert spec.data == {"format": "jsonl", "max_length": 16}
    assert b"secret-project" not in spec.to_json()


@pytest.mark.parametrize(
    "shared",
    [
        {"columns": {"answer": "long_answer"}, "format": "jsonl"},
        {
            "path": "/etc/private.jsonl",
            "topic_column": "long_answer",
            "client_column": "long_answer",
            "format": "jsonl",
        },
        {"format": "jsonl", "train_limit": 1, "subset": "x"},
    ],
)
def test_the_mailbox_chooses_no_column(notes, shared):
    config = own_data(shared, {"path": notes}, WHERE)
    assert config == DataConfig(path=notes, format="jsonl")
    assert [(text.prompt, text.answer) for text in load_texts(config, need_test=False)[0]] == [("note", "ok")]


def test_a_format_reads_columns_and_so_is_the_clients_own(notes):
    shared = {"format": "fed_med", "max_length": 64}
    with pytest.raises(ConfigError, match=r"format 'fed_med': type --data\.format fed_med if .* --data\.format jsonl"):
        own_data(shared, {"path": notes}, WHERE)
    assert own_data(shared, {"path": notes, "format": "jsonl"}, WHERE) == DataConfig(notes, "jsonl", max_length=64)
    assert own_data(shared, {"path": notes, "format": "fed_med"}, WHERE).format == "fed_med"


@pytest.mark.parametrize("path", ["/etc/some_private.jsonl", "demo", None])
def test_without_a_path_of_its_own_a_client_is_told_to_name_one(path):
    with pytest.raises(
        ConfigError, match=r"names no data, and a mailbox cannot: type --data\.path FILE\.jsonl, or .*demo"
    ):
        own_data({"path": path, "format": "jsonl"}, {}, WHERE)


def test_demo_and_own_lengths():
    shared = {"format": "demo", "max_length": 64}
    assert own_data(shared, {"path": "demo", "train_limit": 8}, WHERE) == DataConfig(max_length=64, train_limit=8)
    assert own_data(shared, {"path": "demo", "max_length": 32}, WHERE).max_length == 32


def test_columns_that_a_client_names_itself(notes):
    own = {"path": notes, "format": "jsonl", "columns": {"answer": "long_answer"}}
    assert load_texts(own_data({}, own, WHERE), need_test=False)[0][0].answer == "Jane Roe, SSN 123"
