"""The YAML file of `fedfstq train`, read strictly, and whose choice data are: their owner's, never a mailbox's.

Everything that clients share comes from the mailbox.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fedfstq_hf.errors import ConfigError
from fedfstq_hf.recipe import apply_overrides, build, parse_yaml
from fedfstq_hf.text import printable
from fedfstq_hf.workloads import DataConfig

_PLAIN = "jsonl"
_DEMO = "demo"


@dataclass(frozen=True)
class ClientFile:
    """One client.

    Attributes:
        mailbox: address of the federation.
        client_id: this client's name, unique in the federation.
        data: which data are trained on (see `own_data`): at least `path`, and what columns are read where those are not
            `prompt` and `answer`.
        model: base model, where the federation's spec names none on the Hub.
        uplink_budget: most bytes per message; the federation's default when not given.
        refinement_budget: likewise of second messages, in a federation that has them.
        output_dir: of the trainer; the client's state goes to `OUTPUT_DIR.fedfstq` beside it.
        share_saliency: see `FedFSTQConfig`.
        signing_key: key file that signs this client's messages (`fedfstq keys new KEYFILE` makes one).
        repo: Hub repo this client writes its messages to, where it is not ORG/RUN-CLIENT; see `FedFSTQConfig`.
        dtype: of the frozen base model.
        training: `TrainingArguments` that are the client's own, such as `per_device_train_batch_size`.
        poll_seconds, wait_seconds: see `FedFSTQConfig`.
    """

    mailbox: str
    client_id: str
    data: dict[str, Any]
    model: str | None = None
    uplink_budget: int | str | None = None
    refinement_budget: int | str | None = None
    output_dir: str | None = None
    signing_key: str | None = None
    share_saliency: bool = False
    repo: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    training: dict[str, Any] = field(default_factory=dict)
    poll_seconds: float = 2.0
    wait_seconds: float | None = None


def load_client_file(path: str | Path, overrides: Mapping[str, object] | None = None) -> ClientFile:
    """Read a client file and apply dotted overrides.

    Raises:
        ConfigError: the file is missing, or a key is unknown (the nearest valid one is named).
    """
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"There is no client file {path}. Write one with the keys mailbox, client_id and data.path.")
    where = f"client file {file.name}"
    mapping = parse_yaml(file.read_text(encoding="utf-8"), where)
    if not isinstance(mapping, dict):
        raise ConfigError(f"{where} must be a mapping with the keys mailbox, client_id and data, not {mapping!r}.")
    return build(ClientFile, apply_overrides(mapping, overrides or {}), where)


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
