"""From a `DataConfig` to tokenised train and test examples.

Train and test are the data's own split where there is one, else one by group; a group is never on both sides.
"""

import hashlib
import math
import re
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fedfstq_hf.errors import DataError
from fedfstq_hf.workloads.data_config import DataConfig
from fedfstq_hf.workloads.examples import Example, tokenize_pairs
from fedfstq_hf.workloads.rows import Text, read_rows, read_text

_TEST_NAMES = ("test",)
_UNUSED_NAMES = ("validation", "valid", "val", "dev")


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


def split_texts(
    texts: Sequence[Text], config: DataConfig, *, need_test: bool, held_out: str = "test"
) -> tuple[list[Text], list[Text]]:
    """Return (train, test), each within its limit and in the order of the file; test may be empty if not needed.

    With `held_out="validation"` what is returned in the place of the test rows is no test row: the rows whose split
    says validation, or, where none does, `test_fraction` of the groups of the training rows, which are then held out.
    """
    if held_out == "validation":
        return _validation(texts, config)
    if any(text.split is not None for text in texts):
        train, test = _by_column(texts)
    elif need_test:
        train, test = _by_group(texts, config.test_fraction)
    else:
        train, test = list(texts), []
    for name, part in (("train", train), ("test", test)):
        if not part and (name == "train" or need_test):
            raise DataError(f"{config.path} has no {name} rows; a split column must say train and test")
    return _limit(train, config.train_limit), _limit(test, config.test_limit)


def _validation(texts: Sequence[Text], config: DataConfig) -> tuple[list[Text], list[Text]]:
    train, _ = split_texts(texts, config, need_test=True)
    own = [text for text in texts if text.split in _UNUSED_NAMES]
    if own:
        return train, _limit(own, config.test_limit)
    train, held_out = _by_group(train, config.test_fraction)
    return train, _limit(held_out, config.test_limit)


def _by_column(texts: Sequence[Text]) -> tuple[list[Text], list[Text]]:
    train = [text for text in texts if text.split == "train"]
    test = [text for text in texts if text.split in _TEST_NAMES]
    for text in texts:
        if text.split is None or text.split not in ("train", *_TEST_NAMES, *_UNUSED_NAMES):
            raise DataError(f"{text.place}: split must be train or test, got {text.split!r}")
    homes = {text.group: text.place for text in train if text.group is not None}
    for text in test:
        if text.group in homes:
            raise DataError(
                f"{text.place}: group {text.group!r} is in test and also in train ({homes[text.group]}), so the test "
                "would see what was trained on; give the whole group one split, or remove the split column"
            )
    return train, test


def _by_group(texts: Sequence[Text], fraction: float) -> tuple[list[Text], list[Text]]:
    """Hold out `fraction` of the groups, chosen by hash; a row without a group goes with rows of the same prompt."""
    keys = [text.group if text.group is not None else f"prompt:{text.prompt}" for text in texts]
    groups = sorted(set(keys), key=lambda key: hashlib.sha256(key.encode()).digest())
    if len(groups) < 2:
        raise DataError(
            f"{texts[0].place}: all {len(texts)} rows are of one group, which cannot be split into train and test; "
            "add a split column or more groups"
        )
    held_out = set(groups[: min(math.ceil(fraction * len(groups)), len(groups) - 1)])
    train = [text for text, key in zip(texts, keys, strict=True) if key not in held_out]
    return train, [text for text, key in zip(texts, keys, strict=True) if key in held_out]


def _limit(texts: list[Text], limit: int | None) -> list[Text]:
    if limit is None or len(texts) <= limit:
        return texts
    chosen = np.random.default_rng(0).permutation(len(texts))[:limit]
    return [texts[index] for index in sorted(chosen)]


_BUCKETS = 1024
_RANK = 24
_ITERATIONS = 30
_COMMON = 0.25
_WORD = re.compile(r"\w{3,}")


def cluster_topics(documents: Sequence[str | Sequence[str]], num_topics: int, num_fit: int | None = None) -> list[str]:
    """Return a topic name (`topic-0`, ...) for each document, which is text or a list of terms.

    Clusters are found on the first `num_fit` documents (all by default), so that test examples do not shape them.
    """
    num_fit = num_fit or len(documents)
    features = _project(_tf_idf(documents, num_fit), num_fit)
    fit = features[:num_fit]
    centers = _spherical_kmeans(fit, min(num_topics, len(fit)))
    return [f"topic-{index}" for index in np.argmax(features @ centers.T, axis=1)]


def _tf_idf(documents: Sequence[str | Sequence[str]], num_fit: int) -> np.ndarray:
    """Hashed TF-IDF, rows of unit length, shape (documents, buckets)."""
    counts = np.zeros((len(documents), _BUCKETS), dtype=np.float32)
    for row, document in enumerate(documents):
        terms = _WORD.findall(document.lower()) if isinstance(document, str) else document
        for term in terms:
            counts[row, zlib.crc32(term.lower().encode()) % _BUCKETS] += 1
    share = (1 + np.count_nonzero(counts[:num_fit], axis=0)) / (1 + num_fit)
    # What a quarter of the documents share ("Humans", "write a function") says nothing about a topic.
    weights = np.where(share < _COMMON, -np.log(share), 0).astype(np.float32)
    return _unit(np.log1p(counts) * weights)


def _project(features: np.ndarray, num_fit: int) -> np.ndarray:
    """Project on the leading directions of the first `num_fit` rows (latent semantic analysis), rows of unit length."""
    fit = features[:num_fit].astype(np.float64)
    _, vectors = np.linalg.eigh(fit.T @ fit)
    return _unit(features.astype(np.float64) @ vectors[:, -_RANK:])


def _spherical_kmeans(points: np.ndarray, num_clusters: int) -> np.ndarray:
    """Centers (clusters, dim) of unit length; begins with points that are far from each other (k-means++ draws)."""
    rng = np.random.default_rng(0)
    centers = points[[rng.integers(len(points))]]
    while len(centers) < num_clusters:
        distance = np.clip(1 - np.max(points @ centers.T, axis=1), 0, None)
        if distance.sum() <= 1e-9:
            break
        centers = np.vstack([centers, points[rng.choice(len(points), p=distance / distance.sum())]])
    for _ in range(_ITERATIONS):
        nearest = np.argmax(points @ centers.T, axis=1)
        sums = np.zeros_like(centers)
        np.add.at(sums, nearest, points)
        moved = np.where(np.linalg.norm(sums, axis=1, keepdims=True) > 1e-12, _unit(sums), centers)
        if np.allclose(moved, centers, atol=1e-10):
            break
        centers = moved
    return centers


def _unit(rows: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norms > 0, norms, 1)
