"""From prompt and answer to token ids and labels, and from those to padded batches.

Whatever is cut for length, the answer is the last to go.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

from fedfstq_hf.errors import DataError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

IGNORED_LABEL = -100
"""Label that the loss skips, as everywhere in transformers."""


class Example(TypedDict):
    """One tokenised example; `labels` has the length of `input_ids`, -100 on the prompt."""

    input_ids: list[int]
    labels: list[int]
    topic: str
    client: NotRequired[str]


def tokenize_pairs(
    tokenizer: Any, prompts: Sequence[str], answers: Sequence[str], places: Sequence[str], max_length: int
) -> list[tuple[list[int], list[int]]]:
    """Return (input_ids, labels) per pair: prompt, answer, end-of-sequence, together at most `max_length` tokens.

    Prompt and answer are tokenised apart, so that the labels begin exactly where generation will.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise DataError("the tokenizer has no end-of-sequence token, so no answer could end; set tokenizer.eos_token")
    # `verbose=False`: prompts may exceed the model's context here, they are cut below.
    prompt_ids = tokenizer(list(prompts), verbose=False)["input_ids"]
    answer_ids = tokenizer(list(answers), add_special_tokens=False, verbose=False)["input_ids"]
    pairs, cut_prompts, cut_answers = [], 0, 0
    for prompt, answer, place in zip(prompt_ids, answer_ids, places, strict=True):
        if not answer:
            raise DataError(f"{place}: the answer has no tokens, so every label would be masked; remove the row")
        head = prompt[:-1] if prompt and prompt[-1] == eos else prompt
        kept_prompt, kept_answer = fit(head, [*answer, eos], max_length)
        cut_prompts += len(kept_prompt) < len(head)
        cut_answers += len(kept_answer) <= len(answer)
        pairs.append((kept_prompt + kept_answer, [IGNORED_LABEL] * len(kept_prompt) + kept_answer))
    if cut_prompts or cut_answers:
        logger.info(
            "%d of %d prompts lost their middle and %d answers their end to fit max_length=%d tokens",
            cut_prompts,
            len(pairs),
            cut_answers,
            max_length,
        )
    return pairs


def fit(prompt: list[int], answer: list[int], max_length: int) -> tuple[list[int], list[int]]:
    """Cut `prompt` and `answer` to `max_length` together.

    The prompt loses its middle (a quarter of what remains is its beginning: instructions stand first, questions last).
    The answer loses its end only where it leaves the prompt less than a quarter of `max_length`.
    """
    reserved = min(len(prompt), max_length // 4)
    answer = answer[: max_length - reserved]
    room = max_length - len(answer)
    if len(prompt) > room:
        head = room // 4
        prompt = prompt[:head] + prompt[len(prompt) - (room - head) :]
    return prompt, answer


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
