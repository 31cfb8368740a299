"""Which data are read, and what of them, is the decision of whoever owns them: never a mailbox's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedfstq_hf.errors import ConfigError
from fedfstq_hf.recipe import build
from fedfstq_hf.text import printable
from fedfstq_hf.workloads import DataConfig

_PLAIN = "jsonl"
_DEMO = "demo"


def own_data(shared: Mapping[str, Any], own: Mapping[str, Any], where: str) -> DataConfig:
    """The data section of a client or of an evaluation.

    Path, format (which says what columns are read), columns and limits are those of `own`; a path without a format is
    read as `jsonl`, the columns `prompt` and `answer`. Of `shared` only `max_length` is taken where `own` has none.

    Args:
        shared: the data section of the federation's spec.
        own: the data section of a client file, or the options of `fedfstq evaluate`.
        where: names `own` in errors.

    Raises:
        ConfigError: no path, no format where the federation's examples have one of their own, or an impossible value.
    """
    section = dict(own)
    path = section.setdefault("path", None)
    if path is None:
        raise ConfigError(
            f"{where} names no data, and a mailbox cannot: type --data.path FILE.jsonl, or --data.path {_DEMO} for the "
            "embedded examples."
        )
    theirs = shared.get("format", _PLAIN)
    if "format" not in section:
        if path != _DEMO and theirs not in (_PLAIN, _DEMO):
            raise ConfigError(
                f"{where} does not say which columns are read. The federation's examples have format "
                f"{printable(theirs, 40)!r}: type --data.format {printable(theirs, 40)} if yours have it too, or "
                f"--data.format {_PLAIN} for the columns prompt and answer."
            )
        section["format"] = _DEMO if path == _DEMO else _PLAIN
    if "max_length" in shared:
        section.setdefault("max_length", shared["max_length"])
    return build(DataConfig, section, where)
