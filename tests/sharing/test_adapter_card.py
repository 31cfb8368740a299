"""The card says what was measured, and nothing that was not."""

import dataclasses
import re

import pytest
from huggingface_hub import ModelCard

from fedfstq_hf.reporting.card.markup import license_id
from fedfstq_hf.sharing.adapter_card import render_card
from fedfstq_hf.sharing.packed import EXACT_FILE

CONFIG = {"base_model_name_or_path": "org/base", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8}
FULL = {
    "name": "Notes",
    "repo_id": "org/notes-small",
    "license": "apache-2.0",
    "datasets": ["org/notes", "/home/me/data"],
    "tags": "medical",
}


def render(made, config=CONFIG, about=None, **options):
    return render_card(made, config, about or {}, codec=options.pop("codec", "uniform"), num_examples=0, **options)


@pytest.mark.parametrize("config", [CONFIG, {"r": 4, "lora_alpha": 8}, {**CONFIG, "base_model_name_or_path": "/a/b"}])
@pytest.mark.parametrize("about", [{}, FULL, dict.fromkeys(FULL), {"name": "", "license": "None", "datasets": []}])
@pytest.mark.parametrize("measured", [True, False])
@pytest.mark.parametrize("plain", [b"x" * 10, None])
def test_nothing_is_blank_whatever_is_missing(made, config, about, measured, plain):
    quality = {"before": {"exact_match": 0.5}, "after": {"exact_match": 0.25}} if measured else {}
    exact = {EXACT_FILE: b"12"} if plain else {}
    other = dataclasses.replace(made, plain=plain, files={**made.files, **exact}, **quality)
    card = render(other, config, about)
    assert not re.search(r"\bNone\b|\bnan\b|\[\]|\{\{|\{%|``", card.replace("```", ""))
    assert not re.search(r"^#+ *$", card, re.MULTILINE)
    assert not re.search(r"^#+ .*\n+#+ ", card, re.MULTILINE)
    assert not re.search(r"\| *\| *\w|\|\s*\|$", card)
    assert not re.search(r"\n\n\n", card)
    assert ("was not measured" in card) is not measured
    assert ("| `exact_match` | 0.5000 | 0.2500 |" in card) is measured
    assert (EXACT_FILE in card) is bool(plain)
    ModelCard(card)


def test_metadata_is_what_the_hub_takes(made):
    data = ModelCard(render(made, about=FULL)).data
    assert data.base_model == "org/base"
    assert data.datasets == ["org/notes"]
    assert data.license == "apache-2.0"
    assert data.library_name == "peft"
    assert {"lora", "medical", "compressed-adapter"} <= set(data.tags)
    assert "base_model" not in ModelCard(render(made, {**CONFIG, "base_model_name_or_path": "/a/b"})).data.to_dict()


def test_sizes_are_those_of_the_files(made):
    card = render(made)
    for name, content in made.files.items():
        assert f"| `{name}` | {len(content):,} |" in card
    assert f"| **{sum(map(len, made.files.values())):,}** |" in card
    assert f"| {made.plain_bytes:,} |" in card


def test_how_it_was_made_is_told_as_it_was(made):
    assert "No calibration set was used" in render(made)
    calibrated = render_card(made, CONFIG, {}, codec="uniform", num_examples=64)
    assert "from 64 calibration examples" in calibrated
    assert "equal product of orthogonal components" in calibrated
    assert "drawn again from its seed" in render(dataclasses.replace(made, seeded=True))
    assert "orthogonal" not in render(made, codec="fp16")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("MIT", ("mit", None)),
        ("CC BY-NC 4.0", ("cc-by-nc-4.0", None)),
        ("openrail++", ("openrail++", None)),
        ("Ours 1", ("other", "ours-1")),
        ("", (None, None)),
        ("?", ("other", None)),
    ],
)
def test_a_license_is_one_that_the_hub_takes(given, expected):
    assert license_id(given) == expected
