"""`fedfstq evaluate`: the quality of a published adapter on somebody's held-out examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedfstq_hf.adapter import AdapterView, base_fingerprint, check_same_base
from fedfstq_hf.errors import ConfigError, DataError
from fedfstq_hf.evaluation import Evaluator
from fedfstq_hf.federation import adapter_file
from fedfstq_hf.federation.mailbox import ADAPTER_CONFIG_FILE, ADAPTER_FILE, RECORD_FILE, Mailbox
from fedfstq_hf.federation.record import RoundRecord
from fedfstq_hf.federation.spec import FederationSpec
from fedfstq_hf.founding import load_base, wrap_base
from fedfstq_hf.recipe import build
from fedfstq_hf.workloads import DataConfig, load_workload
from fedfstq_hf.workloads.formats import read_text
from fedfstq_hf.workloads.rows import read_rows
from fedfstq_hf.workloads.tokenize import tokenize_pairs


@dataclass(frozen=True)
class Measured:
    """What was measured on the adapter of `round`: metric names to values, on so many examples."""

    round: int
    num_examples: int
    metrics: dict[str, float]


def measure(
    mailbox: Mailbox,
    spec: FederationSpec,
    data: Mapping[str, Any],
    *,
    model: str | None = None,
    round: int | None = None,
    batch_size: int = 16,
    dtype: str = "float32",
) -> Measured:
    """Evaluate a published adapter.

    Args:
        data: changes to the federation's data section; `path` names the held-out examples. Of data with a split of
            their own the test part is taken, of others all.
        model: base model, where it lies elsewhere than the federation's spec says.
        round: whose adapter; the newest when None.
        batch_size: examples per forward pass.
        dtype: of the base model.

    Raises:
        ConfigError: there is no such round.
        AdapterMismatchError: another base model than the federation's.
    """
    head = mailbox.head() or 0
    chosen = head if round is None else round
    if not 0 <= chosen <= head:
        raise ConfigError(f"There is no round {chosen} yet: the newest is {head}. Give a round from 0 to {head}.")
    config = _config(spec, data)
    base, tokenizer = load_base(model or spec.model, dtype)
    adapted = wrap_base(base, mailbox.read(0, ADAPTER_CONFIG_FILE))
    check_same_base(base_fingerprint(adapted), spec.base_fingerprint, spec.model)
    examples = _examples(config, tokenizer, held_out="path" in data)
    record = RoundRecord.from_json(mailbox.read(chosen, RECORD_FILE))
    view = AdapterView(adapted)
    published = mailbox.read(chosen, ADAPTER_FILE)
    state = adapter_file.load(published, expected_sha256=record.adapter_sha256, schema=view.schema)
    view.write(view.schema.flatten(state))
    return Measured(chosen, len(examples), Evaluator(examples, tokenizer.pad_token_id, batch_size)(adapted))


def _config(spec: FederationSpec, data: Mapping[str, Any]) -> DataConfig:
    """The federation's data section, changed by `data`."""
    section = {**spec.data, **data}
    if "path" in data:  # a held-out file need not say whose its rows are
        section |= {"client_column": data.get("client_column"), "topic_column": data.get("topic_column")}
        if section["path"] != "demo" and section.get("format") == "demo":
            section["format"] = "jsonl"
    return build(DataConfig, section, "the data to evaluate on")


def _examples(config: DataConfig, tokenizer: Any, *, held_out: bool) -> Sequence[Mapping[str, Any]]:
    """The test part of the data; of held-out data that name no parts, all."""
    if not held_out:
        return load_workload(config, tokenizer).test
    texts = [read_text(row, config) for row in read_rows(config)]
    if any(text.split is not None for text in texts):
        texts = [text for text in texts if text.split == "test"]
        if not texts:
            raise DataError(f"{config.path} has a split column, but no row whose split is test: nothing is held out.")
    texts = texts[: config.test_limit]
    pairs = tokenize_pairs(
        tokenizer,
        [text.prompt for text in texts],
        [text.answer for text in texts],
        [text.place for text in texts],
        config.max_length,
    )
    return [{"input_ids": input_ids, "labels": labels} for input_ids, labels in pairs]
