"""Specs, records, histories and metrics for cards, and what must hold for every rendered card."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from typing import Any

import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from specs import flat_spec

from fedfstq_hf.federation.history import HistoryRow
from fedfstq_hf.federation.record import RoundRecord
from fedfstq_hf.federation.server.publication import RoundFacts
from fedfstq_hf.federation.spec import FederationSpec
from fedfstq_hf.reporting.card.federation_card import render_card

_UNFILLED = re.compile(r"\b(?:none|null|nan|undefined)\b|\[\]|\{\}|\{\{|\{%|[\s\]]\(\)|(?<!`)``(?!`)", re.IGNORECASE)

ADAPTER_BYTES = 1_793_000
LORA = {
    "task_type": "CAUSAL_LM",
    "r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.05,
    "target_modules": ["q_proj", "v_proj"],
}
DESCRIPTION = "Answers to biomedical questions."


def make_spec(**changes: Any) -> FederationSpec:
    fields: dict[str, Any] = {
        "name": "Fed-Med",
        "model": "HuggingFaceTB/SmolLM2-135M",
        "base_fingerprint": {},
        "schema": "a" * 64,
        "rounds": 12,
        "local_steps": 10,
        "max_message_bytes": 5000,
        "min_clients": 4,
        "codec": "fstq",
        "uplink_budget": "0.2bpp",
        "training": {"optim": "adamw_torch", "learning_rate": 5e-4, "lr_scheduler_type": "constant"},
    }
    return flat_spec(**(fields | changes))


def make_record(round: int, **changes: Any) -> RoundRecord:
    fields: dict[str, Any] = {
        "round": round,
        "adapter_sha256": "b" * 64,
        "adapter_digest": "d" * 64,
        "adapter_bytes": ADAPTER_BYTES,
        "schema": "a" * 64,
        "opened_at": 60.0 * round,
        "deadline": None,
        "finished": False,
    }
    return RoundRecord(**(fields | changes))


def make_history(rounds: int, **changes: Any) -> list[HistoryRow]:
    """Round 0 and `rounds` rounds of four updates with 44,600 bytes; `changes` are fields of the last row."""
    rows = [HistoryRow(0, 0.0, 0, 0, 0, ADAPTER_BYTES, ADAPTER_BYTES)]
    for round in range(1, rounds + 1):
        fields: dict[str, Any] = {"accepted": 4} | (changes if round == rounds else {})
        rows.append(HistoryRow(round, 60.0 * round, 300, 44_600, 4 * ADAPTER_BYTES, 900_000, ADAPTER_BYTES, **fields))
    return rows


def make_metrics(rounds: int, source: str = "heldout") -> dict[int, dict[str, dict[str, float]]]:
    return {round: {source: {"eval_loss": 3.62 - 0.04 * round}} for round in range(rounds + 1)}


def make_facts(rounds: int = 3, **changes: Any) -> RoundFacts:
    """What a card is made from after some rounds; `changes` replace any of it."""
    fields: dict[str, Any] = {
        "spec": make_spec(),
        "record": make_record(rounds),
        "history": make_history(rounds),
        "metrics": make_metrics(rounds),
        "adapter_config": LORA,
        "existing_card": None,
    }
    return RoundFacts(**(fields | changes))


def render(
    rounds: int = 3,
    *,
    repo_id: str | None = "my-org/fed-med",
    description: str | None = DESCRIPTION,
    alt: str | None = "eval_loss against cumulative uplink",
    **changes: Any,
) -> str:
    """A card after some rounds; `changes` are those of `make_facts`."""
    return render_card(make_facts(rounds, **changes), repo_id=repo_id, description=description, alt=alt)


def metadata(card: str) -> dict[str, Any]:
    """The metadata of a card, which must be plain YAML between its first two lines of dashes."""
    assert card.startswith("---\n")
    fields = yaml.safe_load(card.split("\n---\n")[0].removeprefix("---\n"))
    assert isinstance(fields, dict)
    return fields


def check_card(card: str) -> None:
    """Nothing empty and nothing that a template forgot, and metadata that the Hub's client reads back unchanged."""
    fields = metadata(card)
    _check_filled(fields)
    parsed = ModelCard(card)
    assert parsed.data.to_dict() == fields
    assert str(parsed) == card
    if "model-index" in fields:
        name, results = model_index_to_eval_results(fields["model-index"])
        assert name
        assert results
    text = parsed.text
    assert not _UNFILLED.findall(text)
    assert "\n\n\n" not in text
    lines = text.strip().split("\n")
    assert not [line for line in lines if line != line.rstrip() or re.search(r"\|\s*\||[ (],|,,|:$", line)]
    told = [line for line in lines if line and not line.startswith("<!--")]
    for line, following in zip(told, [*told[1:], "#"], strict=True):
        if line.startswith("#"):
            assert not following.startswith("#"), f"empty heading {line}"
            assert line.strip("# ")
    for row, following in itertools.pairwise(lines):  # a table has a body, and columns as its head has
        if row.startswith("|") and following.startswith("|"):
            assert row.count("|") == following.count("|")
        if row.startswith("|---"):
            assert following.startswith("|")


def _check_filled(value: object) -> None:
    if isinstance(value, Mapping):
        assert value
        for item in value.values():
            _check_filled(item)
    elif isinstance(value, list):
        assert value
        for item in value:
            _check_filled(item)
    else:
        assert value is not None
        assert value not in ("", "None")
