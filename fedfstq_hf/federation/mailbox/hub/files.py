"""The files of a federation's repos: `hf://org/repo` addresses, paths, largest sizes, and what the small ones hold."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedfstq_hf.errors import ConfigError, MailboxError
from fedfstq_hf.federation import control, record
from fedfstq_hf.federation.mailbox.protocol import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    FRAME_FILE,
    RECORD_FILE,
    SPEC_FILE,
    checked_repo,
)
from fedfstq_hf.federation.spec import MAX_SPEC_BYTES
from fedfstq_hf.federation.storage import is_name
from fedfstq_hf.text import parse_object, printable

logger = logging.getLogger(__name__)

SCHEME = "hf://"
FOLDER = "fedfstq"
"""Everything of ours that is not for plain PEFT users lies in this folder of the global repo."""
LAYOUT_PATH = f"{FOLDER}/mailbox.json"
CONTROL_PATH = f"{FOLDER}/control.json"
METRICS_PATH = f"{FOLDER}/metrics.json"
HEAD_PATH = f"{FOLDER}/round.json"

_AT_ROOT = (ADAPTER_FILE, ADAPTER_CONFIG_FILE)
_PER_ROUND = ("round.json", FRAME_FILE)
_OURS_AT_ROOT = ("history.jsonl",)

_LAYOUT_FORMAT = 1
_LARGEST_METRIC = 1e30
"""Sums and squares of what is plotted stay finite."""
_METRIC = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_ ./@-]{0,63}")
_ROUND = re.compile(r"[0-9]{1,9}")


@dataclass(frozen=True)
class HubAddress:
    """The global repo of a federation: `org/name`."""

    org: str
    name: str

    @property
    def repo_id(self) -> str:
        """`org/name`."""
        return f"{self.org}/{self.name}"

    @property
    def mailbox_repo(self) -> str:
        """The repo that all clients write to, in the layouts that have one."""
        return f"{self.org}/{self.name}-mailbox"

    def client_repo(self, client_id: str) -> str:
        """The repo of one client in the layout with one repo each."""
        return f"{self.org}/{self.name}-{client_id}"


def parse_address(address: str) -> HubAddress:
    """The repo at an `hf://` address.

    Raises:
        ConfigError: it does not name one model repo.
    """
    try:
        return HubAddress(*checked_repo(address.removeprefix(SCHEME)).split("/"))
    except ConfigError:
        raise ConfigError(
            f"{address} is no address of a federation on the Hub. Type hf://ORG/REPO, such as hf://my-org/med-lora."
        ) from None


def head_path(name: str) -> str:
    """Where a file of the newest round lies in the global repo."""
    return name if name in _AT_ROOT else f"{FOLDER}/{name}"


def round_path(round: int, name: str) -> str | None:
    """Where a file of any round lies at the newest commit; None if only that round's commit has it."""
    return f"{FOLDER}/rounds/{round:06d}/{name}" if name in _PER_ROUND else None


def root_path(name: str) -> str:
    """Where a file for people lies."""
    return f"{FOLDER}/{name}" if name in _OURS_AT_ROOT else name


def publication(round: int, files: dict[str, bytes]) -> dict[str, bytes]:
    """Path -> content of what one round's commit writes."""
    written = {head_path(name): data for name, data in files.items()}
    for name, data in files.items():
        path = round_path(round, name)
        if path is not None:
            written[path] = data
    # the frame of one round must not be taken for that of a later one that has none
    written.pop(head_path(FRAME_FILE), None)
    return written


MAX_LAYOUT_BYTES = 1000
MAX_METRICS_BYTES = 10**6
_MAX_TENSOR_BYTES = 8 * 10**9
_MAX_ROOT_BYTES = 64 * 10**6
_MOST = {
    LAYOUT_PATH: MAX_LAYOUT_BYTES,
    CONTROL_PATH: control.MAX_BYTES,
    METRICS_PATH: 16 * MAX_METRICS_BYTES,  # all evaluations of the coordinator, where a client's are its own
    head_path(SPEC_FILE): MAX_SPEC_BYTES,
    head_path(ADAPTER_CONFIG_FILE): 10**6,
}


def most_bytes(path: str) -> int:
    """The most bytes of a file of the global repo; tensors are as large as the adapter, which the reader may know."""
    if path in _MOST:
        return _MOST[path]
    if path.endswith(f"/{RECORD_FILE}"):
        return record.MAX_BYTES
    return _MAX_TENSOR_BYTES if path.endswith(".safetensors") else _MAX_ROOT_BYTES


# -- what the small ones hold --------------------------------------------------------------------------------------


def dump(value: Any) -> bytes:
    """Readable JSON with sorted keys."""
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def layout_file(name: str) -> bytes:
    """The file that names a federation's layout."""
    return dump({"format": _LAYOUT_FORMAT, "layout": name})


def layout_in(data: bytes) -> str | None:
    """The layout that the file names; None if it is of another version.

    Raises:
        MailboxError: it cannot be read.
    """
    fields = parse_object(data, "The layout file", max_bytes=MAX_LAYOUT_BYTES)
    name = fields.get("layout")
    return name if fields.get("format") == _LAYOUT_FORMAT and isinstance(name, str) else None


def round_in(data: bytes | None, address: str) -> int:
    """The round that a record is of. Raises `MailboxError` if it is none."""
    fields = parse_object(data or b"", f"The round record of {address}", max_bytes=record.MAX_BYTES)
    round = fields.get("round")
    if not isinstance(round, int) or isinstance(round, bool) or round < 0:
        raise MailboxError(f"The round record of {address} names round {printable(round, 40)}.")
    return round


def parse_metrics(data: bytes | None, whose: str, *, max_bytes: int) -> dict[int, dict[str, dict[str, Any]]]:
    """Posted metrics: round -> source -> name -> number.

    Whoever may write the file may have written anything, so what is no metric is left out, with a warning.

    Args:
        whose: completes "The metrics of ...", for the warning.
    """
    if data is None:
        return {}
    try:
        fields = parse_object(data, f"The metrics of {whose}", max_bytes=max_bytes)
    except MailboxError as error:
        logger.warning("%s They are left out.", error)
        return {}
    found: dict[int, dict[str, dict[str, Any]]] = {}
    dropped = 0
    for round, sources in fields.items():
        if not _ROUND.fullmatch(round) or not isinstance(sources, dict):
            dropped += 1
            continue
        for source, values in sources.items():
            if not is_name(source) or not isinstance(values, dict):
                dropped += 1
                continue
            numbers = {name: value for name, value in values.items() if _METRIC.fullmatch(name) and _is_number(value)}
            dropped += len(values) - len(numbers)
            found.setdefault(int(round), {})[source] = numbers
    if dropped:
        logger.warning("The metrics of %s: %d entries are no metrics; they are left out.", whose, dropped)
    return found


def with_metric(data: bytes | None, round: int, source: str, metrics: Mapping[str, Any], *, max_bytes: int) -> bytes:
    """The file with one more metric in it.

    Raises:
        MailboxError: a value is not a number that a reader takes.
    """
    for name, value in metrics.items():
        if not _METRIC.fullmatch(name) or not _is_number(value):
            raise MailboxError(
                f"{printable(name, 80)} = {printable(value, 40)} of {source} cannot be posted: expected a finite "
                f"number of at most {_LARGEST_METRIC:g}, named by letters, digits and '_'."
            )
    found = parse_metrics(data, "this repo so far", max_bytes=max_bytes)
    found.setdefault(round, {})[source] = dict(metrics)
    return dump({str(round): sources for round, sources in sorted(found.items())})


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST_METRIC
