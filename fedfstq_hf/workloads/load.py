"""From a `DataConfig` to tokenised train and test examples."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedfstq_hf.workloads.config import DataConfig
from fedfstq_hf.workloads.formats import Text, read_text
from fedfstq_hf.workloads.rows import read_rows
from fedfstq_hf.workloads.splits import split_texts
from fedfstq_hf.workloads.tokenize import Example, tokenize_pairs
from fedfstq_hf.workloads.topics import cluster_topics


@dataclass(frozen=True)
class Workload:
    """Tokenised examples; those of `train` are what is split over clients."""

    train: list[Example]
    test: list[Example]

    def __repr__(self) -> str:
        topics = Counter(example["topic"] for example in self.train)
        tokens = sum(len(example["input_ids"]) for example in self.train)
        shares = ", ".join(f"{topic} {count}" for topic, count in topics.most_common())
        return f"Workload(train={len(self.train)} ({tokens} tokens; {shares}), test={len(self.test)})"


def load_texts(config: DataConfig, *, need_test: bool = True, held_out: str = "test") -> tuple[list[Text], list[Text]]:
    """Return (train, test) as text, each with its topic; raises `DataError` naming row and column for what is wrong.

    With `need_test=False`, for one client's own data, rows without a split are all for training, test may be empty, and
    rows without a topic are not clustered: only a simulation splits them by topic.
    With `held_out="validation"`, for tuning, test holds other rows than the test rows (see `split_texts`).
    """
    texts = [read_text(row, config) for row in read_rows(config)]
    train, test = split_texts(texts, config, need_test=need_test, held_out=held_out)
    texts = [*train, *test]
    if need_test and any(text.topic is None for text in texts):
        topics: Sequence[str] = cluster_topics([text.terms for text in texts], config.topics, num_fit=len(train))
        texts = [replace(text, topic=topic) for text, topic in zip(texts, topics, strict=True)]
    return texts[: len(train)], texts[len(train) :]


def load_workload(config: DataConfig, tokenizer: Any, *, need_test: bool = True, held_out: str = "test") -> Workload:
    """Load, split, and tokenise a data set with a transformers tokenizer; for the options see `load_texts`."""
    train, test = load_texts(config, need_test=need_test, held_out=held_out)
    return Workload(_tokenize(train, tokenizer, config.max_length), _tokenize(test, tokenizer, config.max_length))


def _tokenize(texts: Sequence[Text], tokenizer: Any, max_length: int) -> list[Example]:
    if not texts:
        return []
    pairs = tokenize_pairs(
        tokenizer,
        [text.prompt for text in texts],
        [text.answer for text in texts],
        [text.place for text in texts],
        max_length,
    )
    examples: list[Example] = []
    for text, (input_ids, labels) in zip(texts, pairs, strict=True):
        example = Example(input_ids=input_ids, labels=labels, topic=text.topic or "")
        if text.client is not None:
            example["client"] = text.client
        examples.append(example)
    return examples
