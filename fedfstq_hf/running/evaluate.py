"""Quality on held-out examples (loss a target token, exact match), and `fedfstq evaluate` of a published adapter."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fedfstq_hf.adapter import AdapterView, base_fingerprint, check_same_base
from fedfstq_hf.errors import ConfigError, DataError
from fedfstq_hf.federation import adapter_file
from fedfstq_hf.federation.envelope import Records
from fedfstq_hf.federation.mailbox.protocol import ADAPTER_CONFIG_FILE, ADAPTER_FILE, Mailbox
from fedfstq_hf.federation.spec import FederationSpec
from fedfstq_hf.generation.saliency import tokenizer_fingerprint
from fedfstq_hf.running.client_file import own_data
from fedfstq_hf.running.foundation import load_base, load_shared_base, wrap_base
from fedfstq_hf.workloads import DataConfig
from fedfstq_hf.workloads.examples import IGNORED_LABEL, collate, tokenize_pairs
from fedfstq_hf.workloads.rows import read_rows, read_text


class Counts(NamedTuple):
    """Sums over one batch: `loss` in nats, target `tokens`, `matches` and `examples`."""

    loss: float
    tokens: int
    matches: int
    examples: int


class Evaluator:
    """Evaluates one model again and again on the same examples, in batches of similar length.

    Args:
        examples: with `input_ids` and `labels` (-100 on the prompt).
        pad_id: padding token.
        batch_size: examples per forward pass.
        bf16: run the forward passes in bfloat16 autocast, as a Trainer with `bf16` evaluates.
    """

    def __init__(
        self, examples: Sequence[Mapping[str, Any]], pad_id: int, batch_size: int, *, bf16: bool = False
    ) -> None:
        if not examples:
            raise DataError(
                "There are no held-out examples to evaluate on; give the data a test split or a test_fraction."
            )
        ordered = sorted(examples, key=lambda example: len(example["input_ids"]))
        self._batches = [collate(ordered[i : i + batch_size], pad_id) for i in range(0, len(ordered), batch_size)]
        self._bf16 = bf16

    def __len__(self) -> int:
        """Number of batches."""
        return len(self._batches)

    def __call__(self, model: nn.Module) -> dict[str, float]:
        """Returns `eval_loss` (nats per target token) and `exact_match`.

        `exact_match` is the share of examples whose target tokens are all the most likely ones given those before: just
        those that greedy generation answers exactly, end of text included.
        """
        return self.combine(self.count(model, number) for number in range(len(self)))

    @torch.no_grad()
    def count(self, model: nn.Module, number: int) -> Counts:
        """The sums of one batch, for `combine`: the batches of an evaluation may be counted in several processes."""
        was_training = model.training
        model.eval()
        batch = self._batches[number]
        device = next(model.parameters()).device
        labels = batch["labels"]
        targets = torch.full_like(labels, IGNORED_LABEL)
        targets[:, :-1] = labels[:, 1:]  # position t predicts token t + 1
        keep = targets != IGNORED_LABEL
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self._bf16):
            logits = logits_at(model, batch, keep, device)
        wanted = targets[keep].to(device)
        loss = float(nn.functional.cross_entropy(logits.float(), wanted, reduction="sum"))
        wrong = torch.zeros_like(keep)
        wrong[keep] = (logits.argmax(dim=-1) != wanted).cpu()
        model.train(was_training)
        return Counts(loss, len(wanted), int((~wrong.any(dim=1)).sum()), len(labels))

    @staticmethod
    def combine(counts: Iterable[Counts]) -> dict[str, float]:
        """The metrics of a whole evaluation; `counts` of all batches in their order, so that sums round the same."""
        loss, tokens, matches, examples = (sum(column) for column in zip(*counts, strict=True))
        return {"eval_loss": loss / tokens if tokens else math.nan, "exact_match": matches / examples}


def logits_at(model: nn.Module, batch: Mapping[str, Tensor], keep: Tensor, device: torch.device) -> Tensor:
    """Logits (num_kept, vocab) at the kept positions; a 2-D mask projects only those through the LM head."""
    inputs = {"input_ids": batch["input_ids"].to(device), "attention_mask": batch["attention_mask"].to(device)}
    try:
        logits: Tensor = model(**inputs, logits_to_keep=keep.to(device), use_cache=False).logits
    except TypeError:  # an architecture without logits_to_keep
        logits = model(**inputs, use_cache=False).logits
    return logits if logits.dim() == 2 else logits[keep.to(device)]


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
    mine = base_fingerprint(adapted) | {"tokenizer": tokenizer_fingerprint(tokenizer)}
    check_same_base(mine, spec.base_fingerprint, spec.model)
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
