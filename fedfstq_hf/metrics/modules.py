"""Finds and loads the `evaluate` modules of this package."""

from __future__ import annotations

import importlib
import tempfile
from pathlib import Path
from typing import Any

from fedfstq_hf.errors import ConfigError

_CLASSES = {
    "exact_match": "ExactMatch",
    "rouge_l": "RougeL",
    "token_f1": "TokenF1",
    "token_recall": "TokenRecall",
}


def names() -> list[str]:
    """Names of the metrics, sorted."""
    return sorted(_CLASSES)


def folder(name: str) -> str:
    """Absolute path of a metric's folder, for `evaluate.load(folder(name))`. Raises ConfigError on an unknown name."""
    _check(name)
    return str(Path(__file__).parent / name)


def load(name: str, **settings: Any) -> Any:
    """An `evaluate.Metric`, ready for `compute`, `add_batch` and `evaluate.combine`.

    Unlike `evaluate.load` it copies no script into a cache, and holds predictions in memory unless told otherwise: it
    needs neither network nor a writable home, and processes cannot get in each other's way. With `num_process > 1`
    (one metric over several processes) or `keep_in_memory=False`, `evaluate` gathers through files in its cache.

    Args:
        name: one of `names()`.
        settings: of `evaluate.Metric`, such as `experiment_id`, `num_process`, `process_id`, `cache_dir`.

    Raises:
        ConfigError: there is no such metric.
    """
    _check(name)
    metric = getattr(importlib.import_module(f"{__package__}.{name}.{name}"), _CLASSES[name])
    settings.setdefault("keep_in_memory", settings.get("num_process", 1) == 1)
    if not settings["keep_in_memory"] or "cache_dir" in settings:
        return metric(**settings)
    # A Metric makes its cache folder even where it writes nothing into it; this one goes again.
    with tempfile.TemporaryDirectory() as unused:
        return metric(cache_dir=unused, **settings)


def _check(name: str) -> None:
    if name not in _CLASSES:
        raise ConfigError(f"there is no metric {name!r}; expected one of {', '.join(names())}")
