"""Rows of a `.jsonl` file, a data set on the Hub or the demo, and how their columns become prompt, answer and topic.

A format names roles and the columns that may fill them, first match first; `data.columns` puts another column first.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedfstq_hf.errors import DataError
from fedfstq_hf.workloads.data_config import DataConfig

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


@dataclass(frozen=True)
class Text:
    """A row as text. `terms` is what topics are clustered from where `topic` is None."""

    prompt: str
    answer: str
    topic: str | None
    terms: str | list[str]
    group: str | None
    split: str | None
    client: str | None
    place: str


@dataclass(frozen=True)
class Format:
    """Roles with their candidate columns, and how filled roles are written out."""

    required: Mapping[str, tuple[str, ...]]
    optional: Mapping[str, tuple[str, ...]]
    prompt: Callable[[Mapping[str, str]], str]
    answer: Callable[[Mapping[str, str]], str]
    terms: str
    """Role whose content topics are clustered from."""


def _code_prompt(roles: Mapping[str, str]) -> str:
    given = f"\n\n### Input:\n{roles['input']}" if roles.get("input") else ""
    return f"### Instruction:\n{roles['instruction']}{given}\n\n### Response:\n"


_PLAIN = Format(
    # As in TRL's prompt-completion data: the two are joined as they stand, separators included.
    required={"prompt": ("prompt",), "answer": ("answer", "completion")},
    optional={"topic": ("topic",), "group": ("group",), "client": ("client",)},
    prompt=lambda roles: roles["prompt"],
    answer=lambda roles: roles["answer"],
    terms="prompt",
)
_FORMATS: dict[str, Format] = {
    "jsonl": _PLAIN,
    "demo": Format(
        required={**_PLAIN.required, "topic": ("specialty",)},
        optional={},
        prompt=_PLAIN.prompt,
        answer=_PLAIN.answer,
        terms="prompt",
    ),
    "fed_med": Format(
        required={
            "question": ("question",),
            "context": ("context.contexts", "context"),
            "answer": ("long_answer",),
        },
        optional={"terms": ("meshes", "context.meshes"), "group": ("group",)},
        prompt=lambda roles: f"{roles['context']}\n\nQuestion: {roles['question']}\nAnswer:",
        answer=lambda roles: f" {roles['answer']}",
        terms="terms",
    ),
    "fed_aya": Format(
        required={"prompt": ("prompt", "inputs"), "answer": ("answer", "targets"), "topic": ("language",)},
        optional={"group": ("group",)},
        prompt=lambda roles: f"{roles['prompt']}\n",
        answer=lambda roles: roles["answer"],
        terms="prompt",
    ),
    "fed_code": Format(
        required={"instruction": ("instruction",), "answer": ("output",)},
        optional={"input": ("input",), "group": ("group",)},
        prompt=_code_prompt,
        answer=lambda roles: roles["answer"],
        terms="instruction",
    ),
}
_MISSING = object()


def read_text(row: Row, config: DataConfig) -> Text:
    """Turn `row` into text by the format of `config`; a missing or empty column raises `DataError` naming it."""
    form = _FORMATS[config.format]
    for role in config.columns:
        if role not in {**form.required, **form.optional}:
            valid = ", ".join([*form.required, *form.optional])
            raise DataError(f"data.columns: format {config.format} has no role {role!r}; its roles are {valid}")
    roles: dict[str, str] = {}
    for role, columns in form.required.items():
        candidates = (config.columns[role],) if role in config.columns else columns
        value = _find(row.values, candidates)
        if value is _MISSING:
            raise DataError(
                f"{row.place} has no column {' or '.join(map(repr, candidates))} for the {role}; found "
                f"{', '.join(map(repr, row.values))}. Type --data.columns.{role} COLUMN, or another --data.format."
            )
        roles[role] = _as_text(value, row, role)
    for role, columns in form.optional.items():
        value = _find(row.values, (config.columns[role],) if role in config.columns else columns)
        if value is not _MISSING and value is not None and role != "terms":
            roles[role] = _as_text(value, row, role)
    if not roles["answer"].strip():
        raise DataError(f"{row.place}: the answer is empty, so every label would be masked; remove the row")
    return Text(
        prompt=form.prompt(roles),
        answer=form.answer(roles),
        topic=_column(row, config.topic_column, "topic_column") or roles.get("topic"),
        terms=_terms(row, form, config, roles),
        group=roles.get("group"),
        split=_column(row, "split" if "split" in row.values else None, "split"),
        client=_column(row, config.client_column, "client_column") or roles.get("client"),
        place=row.place,
    )


def _find(values: Mapping[str, Any], columns: tuple[str, ...]) -> Any:
    for column in columns:
        node: Any = values
        for part in column.split("."):
            node = node[part] if isinstance(node, Mapping) and part in node else _MISSING
        if node is not _MISSING:
            return node
    return _MISSING


def _as_text(value: Any, row: Row, role: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return "\n".join(value)
    raise DataError(f"{row.place}: the {role} must be text, got {value!r:.60} ({type(value).__name__})")


def _column(row: Row, column: str | None, setting: str) -> str | None:
    if column is None:
        return None
    value = _find(row.values, (column,))
    if value is _MISSING or value is None:
        found = ", ".join(map(repr, row.values))
        raise DataError(f"{row.place} has no value in column {column!r} (data.{setting}); found columns {found}")
    return str(value)


def _terms(row: Row, form: Format, config: DataConfig, roles: Mapping[str, str]) -> str | list[str]:
    if form.terms in roles:
        return roles[form.terms]
    columns = (config.columns["terms"],) if "terms" in config.columns else form.optional["terms"]
    value = _find(row.values, columns)
    # Indexed terms are better topics than words; where a row has none, its question must do.
    return [str(term) for term in value] if isinstance(value, list) and value else roles["question"]
