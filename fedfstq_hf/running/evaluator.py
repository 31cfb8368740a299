"""Quality of an adapter on held-out examples: mean loss per target token, and exact match."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fedfstq_hf.errors import DataError
from fedfstq_hf.workloads.collate import IGNORED_LABEL, collate


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
