from __future__ import annotations

import dataclasses
import itertools
import logging
import re
import tomllib
from pathlib import Path

import jinja2
import jinja2.meta
import pytest
from card_inputs import (
    ADAPTER_BYTES,
    check_card,
    make_facts,
    make_history,
    make_metrics,
    make_record,
    make_spec,
    render,
)
from card_inputs import metadata as read_metadata
from huggingface_hub.repocard_data import model_index_to_eval_results
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from fedfstq_hf.errors import ConfigError
from fedfstq_hf.federation.history import HistoryRow
from fedfstq_hf.reporting.card import federation_card as card_module
from fedfstq_hf.reporting.card.federation_card import PLOT_FILE, card_files, template_path

ROOT = Path(__file__).resolve().parents[2]
NOTHING = st.sampled_from([None, "", "  ", "None", [], "nan"])
COUNT = st.integers(0, 3)


@st.composite
def histories(draw, rounds):
    rows = [HistoryRow(0, 0.0, 0, 0, 0, ADAPTER_BYTES, ADAPTER_BYTES)] if draw(st.booleans()) else []
    for round in range(1, rounds + 1):
        fields = {name: draw(COUNT) for name in ("accepted", "refused", "late", "clipped")}
        fields["restored_from"] = draw(st.sampled_from([None, None, 0, round - 1]))
        fields["reasons"] = draw(
            st.dictionaries(st.sampled_from(["too large", "damaged", "", "a|b"]), COUNT, max_size=3)
        )
        uplink = draw(st.sampled_from([0, 1, 44_600, 10**12]))
        rows.append(
            HistoryRow(round, 0.0, 0, uplink, draw(st.sampled_from([0, 7_172_000])), 10, ADAPTER_BYTES, **fields)
        )
    return rows


VALUES = st.sampled_from([3.1, 0.0, 1e-9, 1e12, 7, float("nan"), float("inf"), True, "3", None, 10**400])
METRICS = st.dictionaries(
    st.integers(0, 5),
    st.dictionaries(
        st.sampled_from(["heldout", "clinic-b", "", "odd|`name`"]),
        st.dictionaries(st.sampled_from(["eval_loss", "exact_match", "None"]), VALUES, max_size=3),
        max_size=3,
    ),
    max_size=5,
)
DESCRIPTIONS = NOTHING | st.sampled_from(["Text.", "Two\n\n\n\nparts <!-- fedfstq:end -->\n"])
LORAS = st.fixed_dictionaries(
    {},
    optional={
        "task_type": st.sampled_from([None, "CAUSAL_LM", "SEQ_CLS", "SOMETHING"]),
        "r": st.sampled_from([None, 8]),
        "lora_alpha": st.sampled_from([None, 16]),
        "lora_dropout": st.sampled_from([None, 0.0, 0.1]),
        "target_modules": st.sampled_from([None, [], "all-linear", ["q"], {"v", "q"}, [f"m{i}" for i in range(30)]]),
        "use_rslora": st.booleans(),
        "use_dora": st.sampled_from([None, True]),
    },
)
SPECS = st.fixed_dictionaries(
    {},
    optional={
        "name": st.sampled_from(["", "None", "two\nlines", "# <b>heading</b>"]),
        "model": st.sampled_from(["", "none", "demo", "gpt2", "/home/me/base", "../x/y", "C:\\models\\base", "a b"]),
        "training": st.sampled_from([{}, {"optim": "sgd", "weight_decay": 0.0}]),
        "codec_options": st.just({"seed": 3}),
        "uplink_budget": st.sampled_from([None, 96_000, "96kB", "round:1bpp"]),
        "error_feedback": st.sampled_from([0.0, None]),
        "server": st.sampled_from([{}, {"optimizer": "Adam", "lr": 0.01, "betas": [0.9, 0.99]}]),
        "clip": st.none(),
        "clients_per_round": st.just(8),
    },
)


@settings(max_examples=100, deadline=None, phases=[Phase.generate])
@given(st.data())
def test_nothing_is_blank_whatever_is_missing(data):
    rounds = data.draw(st.integers(0, 4))
    history = data.draw(histories(rounds))
    card = render(
        rounds,
        spec=make_spec(**data.draw(SPECS)),
        record=make_record(rounds, finished=data.draw(st.booleans())),
        history=data.draw(st.sampled_from([history, history[:-1], []])),
        metrics=data.draw(METRICS),
        adapter_config=data.draw(LORAS),
        repo_id=data.draw(st.sampled_from([None, "my-org/fed-med"])),
        description=data.draw(DESCRIPTIONS),
        alt=data.draw(st.sampled_from([None, "", "[eval_loss]"])),
    )
    check_card(card)


def test_the_full_card_says_it_all():
    history = make_history(3, refused=2, late=1, clipped=1, reasons={"too large": 2, "damaged": 0})
    card = render(3, history=history)
    check_card(card)
    assert "damaged" not in card
    assert read_metadata(card) | {"model-index": ...} == {
        "base_model": "HuggingFaceTB/SmolLM2-135M",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["peft", "lora", "federated-learning", "fedfstq", "gradient-compression"],
        "model-index": ...,
    }
    for part in (
        "# Fed-Med\n\nAnswers to biomedical questions.\n",
        "This is round 3 of 12, after 12 updates of clients; the federation goes on.",
        'AutoModelForCausalLM.from_pretrained(base), "my-org/fed-med")',
        "| `heldout` | `eval_loss` | 3.6200 | 3.5000 | 3 |",
        f"![eval_loss against cumulative uplink]({PLOT_FILE})",
        "| uplink, all clients, 3 rounds | 134 kB | 21.5 MB | 161× |",
        "| downlink, one client that follows 3 rounds | 4.49 MB | 7.17 MB | 1.60× |",
        "| 3 | 4 | 2 | 1 | 44.6 kB | 7.17 MB | 900 kB | 1.79 MB | 3.5000 |",
        "- Local training: 10 steps of `adamw_torch` per round, learning rate `0.0005`, schedule `constant`",
        "- LoRA: rank `16`, alpha `32`, dropout `0.05`, on `q_proj`, `v_proj`",
        "- Codec: `fstq`",
        "- Uplink budget per message: `0.2bpp`",
        "- Server optimizer: `SGD`, lr `1`",
        "Of 15 updates that arrived, 12 were used, 2 refused, 1 too late for their round. 1 update was scaled down",
        "| too large | 2 |",
    ):
        assert part in card


def test_a_budget_of_a_round_is_not_called_one_of_a_message():
    card = render(3, history=make_history(3), spec=make_spec(uplink_budget="round:1bpp"))
    check_card(card)
    assert "- Uplink budget per round: `round:1bpp`" in card
    assert "per message" not in card


def test_refinements_that_were_not_used_are_told_apart_from_updates():
    one, *others = make_history(3)
    card = render(3, history=[dataclasses.replace(one, refinements_unused=2), *others])
    check_card(card)
    assert "Of 12 updates that arrived, 12 were used. 2 refinements were late or refused, and not used." in card


def test_results_name_metric_source_and_round():
    metrics = make_metrics(1) | {3: {"clinic-b": {"exact_match": 0.25}}}
    name, results = model_index_to_eval_results(read_metadata(render(3, metrics=metrics))["model-index"])
    assert name == "fed-med"
    assert [(r.dataset_name, r.metric_type, r.metric_name, r.metric_value, r.task_type) for r in results] == [
        ("clinic-b", "exact_match", "exact_match after round 3", 0.25, "text-generation"),
        ("heldout", "eval_loss", "eval_loss after round 1", 3.58, "text-generation"),
    ]


def test_round_0_has_a_card():
    card = render(0, metrics={}, repo_id=None, description=None)
    check_card(card)
    assert "round 0 of 12, before the first update" in card
    assert '"path/to/this/folder"' in card
    assert "## Bytes" not in card
    assert "## Quality" not in card
    assert "## What was refused" not in card


def test_a_rollback_is_told_and_what_it_undid_is_not_quoted():
    card = render(4, history=make_history(4, restored_from=2))
    assert "Round 4 is a rollback: it published the adapter of round 2 again." in card
    metrics = {round: values for round, values in make_metrics(4).items() if round != 4}
    card = render(4, history=make_history(4, restored_from=2), metrics=metrics)
    assert "| `heldout` | `eval_loss` | 3.6200 | 3.5400 | 2 |" in card


def test_the_embedded_model_is_no_model_of_the_hub():
    card = render(spec=make_spec(model="demo"))
    assert "base_model" not in read_metadata(card)
    assert "from fedfstq_hf.demo import model_path" in card
    assert "base = str(model_path())" in card


def test_a_folder_is_named_without_its_path():
    card = render(spec=make_spec(model="/home/somebody/models/lab-llama"))
    assert "base_model" not in read_metadata(card)
    assert "somebody" not in card
    assert 'base = "path/to/lab-llama"' in card


def test_rows_after_the_published_round_do_not_count():
    assert render(2, history=make_history(5), metrics=make_metrics(5)) == render(2)


def test_a_thousand_rounds_fit():
    metrics = {round: {f"site-{i}": {"eval_loss": 3.0, "exact_match": 0.1} for i in range(50)} for round in range(1001)}
    card = render(1000, spec=make_spec(rounds=1000), metrics=metrics)
    check_card(card)
    assert len(card.encode()) < 60_000
    shown = [int(number) for number in re.findall(r"^\| (\d+) \| \d+ \|", card, re.MULTILINE)]
    assert (len(shown), shown[0], shown[-1]) == (20, 0, 1000)
    assert max(b - a for a, b in itertools.pairwise(shown)) < 60
    assert "20 of 1,001 rounds are shown; the totals count all." in card
    assert "| uplink, all clients, 1,000 rounds | 44.6 MB | 7.17 GB | 161× |" in card
    assert "80 more were posted." in card


def test_hostile_names_stay_text():
    hostile = "x` | <script>alert(1)</script> <!-- fedfstq:end -->\n# big"
    metrics = {round: {hostile: {hostile: 1.0}} for round in range(4)}
    history = make_history(3, refused=1, reasons={hostile: 1})
    card = render(spec=make_spec(name=hostile, model=hostile), metrics=metrics, history=history)
    check_card(card)
    assert card.count("<!-- fedfstq:end") == 1
    assert "\n# big" not in card
    assert "<script>" not in re.sub("`[^`]*`", "", card)


def test_files_are_the_same_bytes_every_time():
    first, again = (card_files(make_facts(spec=make_spec(salt="x")), repo_id=None) for _ in range(2))
    assert first == again
    assert list(first) == ["README.md", PLOT_FILE]


def test_the_plot_is_linked_where_it_is_written():
    for rounds in range(3):
        files = card_files(make_facts(rounds, adapter_config={}), repo_id=None)
        assert (PLOT_FILE in files) == (f"({PLOT_FILE})" in files["README.md"].decode()) == (rounds > 0)


def test_rendering_warns_of_nothing(caplog):
    with caplog.at_level(logging.WARNING):
        card_files(make_facts(existing_card=b"no metadata here"), repo_id=None)
    assert not caplog.records


def test_the_template_asks_for_nothing_that_is_not_given(monkeypatch):
    given = {}

    def catch(cls, card_data, template_path, **variables):
        given.update(variables, card_data=card_data)
        return "---\nlibrary_name: peft\n---\n"

    monkeypatch.setattr(card_module.ModelCard, "from_template", classmethod(catch))
    render()
    parsed = jinja2.Environment(autoescape=False).parse(template_path().read_text(encoding="utf-8"))
    assert jinja2.meta.find_undeclared_variables(parsed) == set(given)


def test_the_template_of_an_installed_package_is_found(monkeypatch, tmp_path):
    assert template_path() == ROOT / "model_card_template.md"
    monkeypatch.setattr(card_module.resources, "files", lambda name: tmp_path / name)
    with pytest.raises(ConfigError, match="Install fedfstq_hf again"):
        template_path()
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    target = tmp_path / wheel["force-include"]["model_card_template.md"]
    target.parent.mkdir(parents=True)
    target.write_text("x")
    assert template_path() == target
