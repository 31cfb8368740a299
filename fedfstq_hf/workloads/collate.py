"""Pads examples on the right into the tensors that a causal language model takes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedfstq_hf.errors import DataError

if TYPE_CHECKING:
    import torch

IGNORED_LABEL = -100
"""Label that the loss skips, as everywhere in transformers."""


def collate(examples: Sequence[Mapping[str, Any]], pad_id: int) -> "dict[str, torch.Tensor]":
    """Stack examples into `input_ids`, `attention_mask`, `labels`: int64, shape (B, T) with T the longest example."""
    import torch

    if not examples:
        raise DataError("cannot make a batch of no examples")
    width = max(len(example["input_ids"]) for example in examples)
    input_ids = torch.full((len(examples), width), pad_id, dtype=torch.long)
    labels = torch.full((len(examples), width), IGNORED_LABEL, dtype=torch.long)
    attention_mask = torch.zeros((len(examples), width), dtype=torch.long)
    for row, example in enumerate(examples):
        length = len(example["input_ids"])
        input_ids[row, :length] = torch.as_tensor(example["input_ids"], dtype=torch.long)
        labels[row, :length] = torch.as_tensor(example["labels"], dtype=torch.long)
        attention_mask[row, :length] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


@dataclass(frozen=True)
class Collator:
    """`collate` with its padding id: a `data_collator` that pickles into worker processes."""

    pad_id: int

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> "dict[str, torch.Tensor]":
        """Batch `examples`; keys other than `input_ids` and `labels` are left out."""
        return collate(examples, self.pad_id)
