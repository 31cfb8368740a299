"""`hf://org/repo` addresses, and the paths inside a federation's repos."""

from __future__ import annotations

from dataclasses import dataclass

from fedfstq_hf.errors import ConfigError
from fedfstq_hf.federation.mailbox.protocol import ADAPTER_CONFIG_FILE, ADAPTER_FILE, checked_repo

SCHEME = "hf://"
FOLDER = "fedfstq"
"""Everything of ours that is not for plain PEFT users lies in this folder of the global repo."""
LAYOUT_PATH = f"{FOLDER}/mailbox.json"
CONTROL_PATH = f"{FOLDER}/control.json"
METRICS_PATH = f"{FOLDER}/metrics.json"
HEAD_PATH = f"{FOLDER}/round.json"

_AT_ROOT = (ADAPTER_FILE, ADAPTER_CONFIG_FILE)
_PER_ROUND = ("round.json", "update.safetensors")
_OURS_AT_ROOT = ("history.jsonl",)


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
    # the change of one round must not be taken for that of a later one that has none
    written.pop(head_path("update.safetensors"), None)
    return written
