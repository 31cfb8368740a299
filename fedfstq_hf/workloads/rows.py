"""Reads rows: from a `.jsonl` file, from a data set on the Hub, or from the demo's generator."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedfstq_hf.errors import DataError
from fedfstq_hf.workloads.config import DataConfig

DEMO_SIZES = {"train": 2000, "test": 200}
"""Examples that the demo makes where the recipe gives no limit."""


@dataclass(frozen=True)
class Row:
    """One row with the place it came from, for error messages."""

    values: dict[str, Any]
    place: str


def read_rows(config: DataConfig) -> list[Row]:
    """Read all rows of the data set, in order. A `split` column is added where the source itself has splits."""
    if config.format == "demo":
        rows = list(_demo_rows(config))
    elif Path(config.path).is_file():
        rows = list(_file_rows(Path(config.path)))
    elif _looks_like_a_file(config.path):
        raise DataError(f"there is no file {config.path}; type --data.path FILE.jsonl, or a Hub data set id")
    else:
        rows = list(_hub_rows(config))
    if not rows:
        raise DataError(f"{config.path} holds no rows; expected at least one for training and one for testing")
    return rows


def _looks_like_a_file(path: str) -> bool:
    return path.endswith((".jsonl", ".json")) or path.startswith((".", "/", "~")) or path.count("/") != 1


def _file_rows(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                values = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{place} is not JSON ({error}); expected one JSON object per line") from None
            if not isinstance(values, dict):
                raise DataError(f"{place} holds a {type(values).__name__}; expected one JSON object per line")
            yield Row(values, place)


def _demo_rows(config: DataConfig) -> Iterator[Row]:
    from fedfstq_hf import demo

    for split, limit in (("train", config.train_limit), ("test", config.test_limit)):
        examples = demo.make_examples(limit or DEMO_SIZES[split], seed=0, split=split)
        for index, example in enumerate(examples):
            yield Row({**example, "split": split}, f"demo, {split} example {index}")


def _hub_rows(config: DataConfig) -> Iterator[Row]:
    from datasets import DatasetDict, load_dataset

    try:
        data = load_dataset(config.path, name=config.subset)
    except (OSError, ValueError) as error:
        raise DataError(
            f"cannot load the data set {config.path!r}: {error} "
            "Without network, type --data.path FILE.jsonl, a file with the same columns."
        ) from error
    splits = dict(data) if isinstance(data, DatasetDict) else {"train": data}
    has_test = next((name for name in ("test", "validation") if name in splits), None)
    for name, part in splits.items():
        if len(splits) > 1 and name not in ("train", has_test):
            continue
        for index, values in enumerate(part):
            extra = {} if has_test is None else {"split": "train" if name == "train" else "test"}
            yield Row({**values, **extra}, f"{config.path}, {name} row {index}")
