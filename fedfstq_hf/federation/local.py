"""The folder mailbox: the embedded default, for one machine or a shared disk.

```
rounds/000000/  round.json adapter_model.safetensors adapter_config.json spec.json   immutable once renamed into place
rounds/000001/  round.json adapter_model.safetensors adapter_config.json update.safetensors server_optimizer.safetensors
updates/000000/CLIENT.safetensors                                                    one per client, never overwritten
metrics/000001/SOURCE.json
adapter_model.safetensors adapter_config.json                                        derived from the newest round
```
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from fedfstq_hf.errors import MailboxError, RoundConflictError, UpdateConflictError
from fedfstq_hf.federation import storage
from fedfstq_hf.federation.mailbox import ADAPTER_CONFIG_FILE, ADAPTER_FILE, UpdateRef

_ROUND = re.compile(r"[0-9]{6,}")
_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class FolderMailbox:
    """A mailbox in a folder. Commits are renames (rounds) and hard links (updates), so nothing is ever half there.

    Args:
        path: the folder; created by the first `publish`.
        durable: fsync what is written. Switch off only where losing power may cost the run (simulations).
    """

    def __init__(self, path: str | os.PathLike[str], *, durable: bool = True) -> None:
        self.path = Path(path).expanduser()
        self.address = str(path)
        self.durable = durable

    def head(self) -> int | None:
        """The newest published round, None before round 0 was published."""
        try:
            rounds = [int(name) for name in os.listdir(self.path / "rounds") if _ROUND.fullmatch(name)]
        except FileNotFoundError:
            return None
        except OSError as error:
            raise MailboxError(f"{self.address} cannot be read as a mailbox: {error.strerror or error}.") from error
        return max(rounds, default=None)

    def read(self, round: int, name: str) -> bytes:
        """A file of a published round."""
        try:
            return (self._round(round) / name).read_bytes()
        except FileNotFoundError:
            raise MailboxError(
                f"{self.address} has no file {name} in round {round}. Expected a federation's folder made by "
                f"`fedfstq init {self.address} ...`."
            ) from None
        except OSError as error:
            raise MailboxError(f"Could not read {self._round(round) / name}: {error.strerror or error}.") from error

    def publish(self, round: int, files: Mapping[str, bytes]) -> None:
        """Publish a round by renaming its finished folder into place."""
        rounds = self.path / "rounds"
        storage.make_folder(rounds, durable=self.durable)
        with self._publishing():
            storage.remove_leftovers(rounds)
            if not storage.create_folder(self._round(round), files, durable=self.durable):
                raise RoundConflictError(f"Round {round} of {self.address} is published already.")

    def refresh_root(self) -> None:
        """Copy the newest adapter to the root, where `PeftModel.from_pretrained` looks for it."""
        head = self.head()
        if head is None:
            return
        with self._publishing():
            newest = self.head() or head  # another coordinator may have gone on while we waited
            storage.remove_leftovers(self.path)
            for name in (ADAPTER_CONFIG_FILE, ADAPTER_FILE):
                data, target = self.read(newest, name), self.path / name
                if not target.is_file() or target.read_bytes() != data:
                    storage.replace_file(target, data, durable=self.durable)

    def post_update(self, round: int, client_id: str, message: bytes) -> None:
        """Post a message under the client's id; the same bytes again are accepted silently."""
        folder = self._updates(round)
        target = folder / f"{_checked(client_id)}.safetensors"
        storage.make_folder(folder, durable=self.durable)
        storage.remove_leftovers(folder, target.name)
        if not storage.create_file(target, message, durable=self.durable) and target.read_bytes() != message:
            raise UpdateConflictError(
                f"Client {client_id!r} already posted another message for round {round} of {self.address}. Is a second "
                "process running under the same client_id? Give each client an id and a state folder of its own."
            )

    def list_updates(self, round: int) -> list[UpdateRef]:
        """The round's messages in client-id order."""
        try:
            entries = list(os.scandir(self._updates(round)))
        except FileNotFoundError:
            return []
        return sorted(
            UpdateRef(entry.name.removesuffix(".safetensors"), round, entry.stat().st_size)
            for entry in entries
            if entry.name.endswith(".safetensors") and _SAFE_NAME.fullmatch(entry.name.removesuffix(".safetensors"))
        )

    def read_update(self, ref: UpdateRef) -> bytes:
        """One message, whole."""
        path = self._updates(ref.round) / f"{_checked(ref.client_id)}.safetensors"
        try:
            return path.read_bytes()
        except OSError as error:
            raise MailboxError(f"Could not read {path}: {error.strerror or error}.") from error

    def post_metric(self, round: int, source: str, metrics: Mapping[str, Any]) -> None:
        """Write `metrics/ROUND/SOURCE.json`."""
        folder = self.path / "metrics" / f"{round:06d}"
        storage.make_folder(folder, durable=self.durable)
        data = json.dumps(dict(metrics), sort_keys=True).encode()
        storage.replace_file(folder / f"{_checked(source)}.json", data, durable=self.durable)

    def read_metrics(self, round: int) -> dict[str, dict[str, Any]]:
        """All posted metrics of a round by source."""
        folder = self.path / "metrics" / f"{round:06d}"
        metrics = {}
        for path in sorted(folder.glob("[!.]*.json")):
            try:
                metrics[path.stem] = dict(json.loads(path.read_bytes()))
            except (ValueError, TypeError) as error:
                raise MailboxError(f"{path} holds no metrics ({error}). Remove it, or post them again.") from error
        return metrics

    def _publishing(self) -> AbstractContextManager[None]:
        """Keeps a second coordinator from cleaning up, or refreshing the root, in the middle of ours."""
        return storage.locked(self.path / "rounds" / ".lock")

    def _round(self, round: int) -> Path:
        return self.path / "rounds" / f"{round:06d}"

    def _updates(self, round: int) -> Path:
        return self.path / "updates" / f"{round:06d}"


def _checked(name: str) -> str:
    if not _SAFE_NAME.fullmatch(name):
        raise MailboxError(
            f"{name!r} cannot name a client or an evaluation set: use 1 to 64 letters, digits, '.', '_' or '-', "
            "starting with a letter or a digit."
        )
    return name
