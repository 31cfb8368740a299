"""What others wrote (names, ids, descriptions), made fit for a model card: nothing empty, no stray markup."""

from __future__ import annotations

import re
from collections.abc import Iterable

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

_EMPTY = {"", "none", "null", "nan", "[]", "{}"}
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]{1,40}")
# PEFT's task type -> the Hub's task, transformers' class; an adapter without a task type is one for causal models here.
TASKS = {
    "CAUSAL_LM": ("text-generation", "AutoModelForCausalLM"),
    "SEQ_2_SEQ_LM": ("text2text-generation", "AutoModelForSeq2SeqLM"),
    "SEQ_CLS": ("text-classification", "AutoModelForSequenceClassification"),
    "TOKEN_CLS": ("token-classification", "AutoModelForTokenClassification"),
    "QUESTION_ANS": ("question-answering", "AutoModelForQuestionAnswering"),
    "FEATURE_EXTRACTION": ("feature-extraction", "AutoModel"),
}
_NOT_ON_HUB = {"demo"}
"""The embedded model and data, which look like ids of the Hub."""


def one_line(value: object, limit: int = 120) -> str | None:
    """Text on one line, without HTML and backticks, cut after `limit` characters; None where nothing is said."""
    if not isinstance(value, str):
        return None
    text = " ".join("".join(char if char.isprintable() else " " for char in value).split())
    text = text.replace("<", "&lt;").replace("`", "'")
    return None if text.lower() in _EMPTY else text if len(text) <= limit else text[: limit - 1].rstrip() + "…"


def code(value: object, limit: int = 80) -> str | None:
    """A code span that also holds in a table cell, or None."""
    if isinstance(value, (int, float)):
        value = f"{value:g}" if isinstance(value, float) else str(value)
    text = one_line(value, limit)
    if text is None:
        return None
    for char, other in (("&lt;", "<"), ("<!--", "<--"), ("|", "/")):
        text = text.replace(char, other)
    return f"`{text}`"


def paragraphs(value: object) -> str | None:
    """Markdown of several paragraphs as its author wrote it, but without HTML comments; None where it is empty."""
    if not isinstance(value, str) or value.strip().lower() in _EMPTY:
        return None
    lines = [line.rstrip() for line in value.replace("<!--", "&lt;!--").strip().splitlines()]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines))


def texts(value: object) -> list[str]:
    """A string or a collection of strings as a list of what is not empty, each once, each on one line."""
    items = [value] if isinstance(value, str) else value if isinstance(value, Iterable) else []
    return list(dict.fromkeys(text for text in map(one_line, items) if text))


def hub_id(value: object) -> str | None:
    """`value` where the Hub takes it as the id of a model or data set, else None (a path, the embedded demo)."""
    if not isinstance(value, str) or value.lower() in _EMPTY | _NOT_ON_HUB or value[:1] in ("/", ".", "~"):
        return None
    try:
        validate_repo_id(value)
    except HFValidationError:
        return None
    return value


def license_id(value: object) -> tuple[str | None, str | None]:
    """The Hub's `license`, and a `license_name` where the text is not an identifier such as `apache-2.0`."""
    given = texts(value)
    if not given:
        return None, None
    name = given[0].lower()
    return (name, None) if _LICENSE.fullmatch(name) else ("other", re.sub(r"[^a-z0-9.]+", "-", name).strip("-") or None)
