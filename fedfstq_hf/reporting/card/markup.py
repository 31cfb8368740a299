"""What others wrote (names, ids, descriptions), made fit for a model card: nothing empty, no stray markup."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

_EMPTY = {"", "none", "null", "nan", "[]", "{}"}
_LICENSES = {
    "afl-3.0", "agpl-3.0", "apache-2.0", "apple-amlr", "apple-ascl", "artistic-2.0", "bigcode-openrail-m",
    "bigscience-bloom-rail-1.0", "bigscience-openrail-m", "bsd", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear",
    "bsl-1.0", "c-uda", "cc", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0",
    "cc-by-nc-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0",
    "cc-by-nd-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc0-1.0", "cdla-permissive-1.0", "cdla-permissive-2.0",
    "cdla-sharing-1.0", "creativeml-openrail-m", "deepfloyd-if-license", "ecl-2.0", "epl-1.0", "epl-2.0",
    "etalab-2.0", "eupl-1.1", "eupl-1.2", "fair-noncommercial-research-license", "gemma", "gfdl", "gpl", "gpl-2.0",
    "gpl-3.0", "grok2-community", "h-research", "intel-research", "isc", "lgpl", "lgpl-2.1", "lgpl-3.0", "lgpl-lr",
    "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4", "lppl-1.3c", "mit", "mpl-2.0", "ms-pl", "ncsa",
    "odbl", "odc-by", "ofl-1.1", "openmdw-1.0", "openmdw-1.1", "openrail", "openrail++", "osl-3.0", "other", "pddl",
    "postgresql", "unknown", "unlicense", "wtfpl", "zlib",
}  # fmt: skip
"""Ids that the Hub takes as `license` (its documentation of repository licences)."""
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


def is_path(value: object) -> bool:
    """Whether a model's name says where it lies on this machine, which is of no use to others."""
    if not isinstance(value, str) or value.lower() in _EMPTY | _NOT_ON_HUB:
        return False
    return hub_id(value) is None or Path(value).exists()


def license_id(value: object) -> tuple[str | None, str | None]:
    """The Hub's `license`, and a `license_name` where the text is not an identifier such as `apache-2.0`."""
    given = texts(value)
    if not given:
        return None, None
    name = given[0].lower()
    named = re.sub(r"[^a-z0-9.+]+", "-", name).strip("-")
    return (named, None) if named in _LICENSES else ("other", named or None)
