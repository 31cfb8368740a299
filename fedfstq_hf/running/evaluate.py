"""`fedfstq evaluate`: the quality of a published adapter on somebody's held-out examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedfstq_hf.adapter import AdapterView, base_fingerprint, check_same_base
from fedfstq_hf.errors import ConfigError, DataError
from fedfstq_hf.federation import adapter_file
from fedfstq_hf.federation.mailbox import ADAPTER_CONFIG_FILE, ADAPTER_FILE, Mailbox
from fedfstq_hf.federation.records import Records
from fedfstq_hf.federation.spec import FederationSpec
from fedfstq_hf.running.evaluator import Evaluator
from fedfstq_hf.running.foundation import load_base, load_shared_base, wrap_base
from fedfstq_hf.running.own_data import own_data
from fedfstq_hf.workloads import DataConfig
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
        data: the evaluation's data section (see `own_data`); `path` names the held-out examples. Of data with a split
            of their own the test part is taken, of others all.
        model: base model, where the federation's spec names none on the Hub.
        round: whose adapter; the newest when None.
        batch_size: examples per forward pass.
        dtype: of the base model.

    Raises:
        ConfigError: there is no such round, or `data` has no path.
        AdapterMismatchError: another base model than the federation's.
    """
    head = mailbox.head() or 0
    chosen = head if round is None else round
    if not 0 <= chosen <= head:
        raise ConfigError(f"There is no round {chosen} yet: the newest is {head}. Give a round from 0 to {head}.")
    config = own_data(spec.data, data, "the evaluation")
    base, tokenizer = load_base(model, dtype) if model is not None else load_shared_base(spec.model, dtype)
    adapted = wrap_base(base, mailbox.read(0, ADAPTER_CONFIG_FILE))
    check_same_base(base_fingerprint(adapted), spec.base_fingerprint, spec.model)
    examples = _examples(config, tokenizer)
    record = Records(mailbox, spec)(chosen)
    view = AdapterView(adapted)
    published = mailbox.read(chosen, ADAPTER_FILE)
    state = adapter_file.load(published, expected_sha256=record.adapter_sha256, schema=view.schema)
    view.write(view.schema.flatten(state))
    return Measured(chosen, len(examples), Evaluator(examples, tokenizer.pad_token_id, batch_size)(adapted))


def _examples(config: DataConfig, tokenizer: Any) -> Sequence[Mapping[str, Any]]:
    """The test part of the data; of data that name no parts, all."""
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
