"""The folder mailbox: the embedded default, for one machine or a shared disk.

```
rounds/000000/  round.json adapter_model.safetensors adapter_config.json spec.json   immutable once renamed into place
rounds/000001/  round.json adapter_model.safetensors adapter_config.json update.safetensors server_optimizer.safetensors
updates/000000/CLIENT.safetensors                                                    one per client, never overwritten
refinements/000000/CLIENT.safetensors                                                their second messages, likewise
metrics/000001/SOURCE.json
attachments/CLIENT/saliency.safetensors                                              what clients send beside messages
adapter_model.safetensors adapter_config.json README.md history.jsonl ...            derived from the newest round
control.json                                                                         who is enrolled; paused or not
```
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from fedfstq_hf.errors import MailboxError, MessageError, RoundConflictError, UpdateConflictError
from fedfstq_hf.federation import storage
from fedfstq_hf.federation.mailbox import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    RootFiles,
    UpdateRef,
    checked_name,
    is_name,
)

_ROUND = re.compile(r"[0-9]{6,}")
_CONTROL_FILE = "control.json"


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

    def read_root(self, name: str) -> bytes | None:
        """A file at the root, None where there is none."""
        try:
            return (self.path / name).read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise MailboxError(f"Could not read {self.path / name}: {error.strerror or error}.") from error

    def publish(self, round: int, files: Mapping[str, bytes], root: RootFiles | None = None) -> None:
        """Publish a round by renaming its finished folder into place, then renew the root."""
        rounds = self.path / "rounds"
        storage.make_folder(rounds, durable=self.durable)
        with self._publishing():
            storage.remove_leftovers(rounds)
            if not storage.create_folder(self._round(round), files, durable=self.durable):
                raise RoundConflictError(f"Round {round} of {self.address} is published already.")
        self.refresh_root(root)

    def refresh_root(self, root: RootFiles | None = None) -> None:
        """Copy the newest adapter to the root, where `PeftModel.from_pretrained` looks, beside what `root` makes.

        The round that `root` was made for may no longer be the newest; a coordinator that publishes renews it again.
        """
        head = self.head()
        if head is None:
            return
        with self._publishing():
            newest = self.head() or head  # another coordinator may have gone on while we waited
            storage.remove_leftovers(self.path)
            files = {name: self.read(newest, name) for name in (ADAPTER_CONFIG_FILE, ADAPTER_FILE)}
            for name, data in {**(root(self.read_root) if root else {}), **files}.items():
                if self.read_root(name) != data:
                    storage.make_folder((self.path / name).parent, durable=self.durable)
                    storage.replace_file(self.path / name, data, durable=self.durable)

    def read_control(self) -> bytes | None:
        """`control.json`, None where it was never written."""
        return self.read_root(_CONTROL_FILE)

    def write_control(self, data: bytes, *, expected: bytes | None) -> bool:
        """Replace `control.json` if it still is `expected`."""
        storage.make_folder(self.path, durable=self.durable)
        with storage.locked(self.path / ".control.lock"):
            if self.read_control() != expected:
                return False
            storage.replace_file(self.path / _CONTROL_FILE, data, durable=self.durable)
        return True

    def post_update(
        self, round: int, client_id: str, message: bytes, *, patience: float | None = None, refinement: bool = False
    ) -> None:
        """Post a message under the client's id; the same bytes again are accepted silently. A folder never waits."""
        folder = self._updates(round, refinement)
        target = folder / f"{checked_name(client_id)}.safetensors"
        storage.make_folder(folder, durable=self.durable)
        storage.remove_leftovers(folder, target.name)
        if not storage.create_file(target, message, durable=self.durable) and target.read_bytes() != message:
            raise UpdateConflictError(
                f"Client {client_id!r} already posted another message for round {round} of {self.address}. Is a second "
                "process running under the same client_id? Give each client an id and a state folder of its own."
            )

    def list_updates(
        self, round: int, clients: Sequence[str] | None = None, *, refinements: bool = False
    ) -> list[UpdateRef]:
        """The round's messages in client-id order."""
        try:
            entries = list(os.scandir(self._updates(round, refinements)))
        except FileNotFoundError:
            return []
        refs = (
            UpdateRef(entry.name.removesuffix(".safetensors"), round, entry.stat().st_size, refinement=refinements)
            for entry in entries
            if entry.name.endswith(".safetensors") and is_name(entry.name.removesuffix(".safetensors"))
        )
        return sorted(ref for ref in refs if clients is None or ref.client_id in clients)

    def read_update(self, ref: UpdateRef, *, max_bytes: int) -> bytes:
        """One message, whole."""
        path = self._updates(ref.round, ref.refinement) / f"{checked_name(ref.client_id)}.safetensors"
        try:
            with open(path, "rb") as file:
                data = file.read(max_bytes + 1)
        except OSError as error:
            raise MailboxError(f"Could not read {path}: {error.strerror or error}.") from error
        if len(data) > max_bytes:
            raise MessageError(f"It has {path.stat().st_size} bytes; at most {max_bytes} are taken.")
        return data

    def post_metric(self, round: int, source: str, metrics: Mapping[str, Any], *, client_id: str | None = None) -> None:
        """Write `metrics/ROUND/SOURCE.json`."""
        folder = self.path / "metrics" / f"{round:06d}"
        storage.make_folder(folder, durable=self.durable)
        data = json.dumps(dict(metrics), sort_keys=True).encode()
        storage.replace_file(folder / f"{checked_name(source)}.json", data, durable=self.durable)

    def read_metrics(self, clients: Sequence[str] = ()) -> dict[int, dict[str, dict[str, Any]]]:
        """All posted metrics: round -> source -> name -> value."""
        metrics: dict[int, dict[str, dict[str, Any]]] = {}
        for path in sorted((self.path / "metrics").glob("*/[!.]*.json")):
            if not _ROUND.fullmatch(path.parent.name):
                continue
            try:
                metrics.setdefault(int(path.parent.name), {})[path.stem] = dict(json.loads(path.read_bytes()))
            except (ValueError, TypeError) as error:
                raise MailboxError(f"{path} holds no metrics ({error}). Remove it, or post them again.") from error
        return metrics

    def post_attachment(self, client_id: str, name: str, data: bytes) -> None:
        """Write `attachments/CLIENT/NAME`."""
        folder = self.path / "attachments" / checked_name(client_id)
        storage.make_folder(folder, durable=self.durable)
        storage.replace_file(folder / checked_name(name), data, durable=self.durable)

    def read_attachment(self, client_id: str, name: str, *, max_bytes: int) -> bytes | None:
        """What lies there, None if nothing."""
        path = self.path / "attachments" / checked_name(client_id) / checked_name(name)
        try:
            with open(path, "rb") as file:
                data = file.read(max_bytes + 1)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise MailboxError(f"Could not read {path}: {error.strerror or error}.") from error
        if len(data) > max_bytes:
            raise MessageError(f"{name} of client {client_id} has more than {max_bytes} bytes.")
        return data

    def attachment_bytes(self, client_id: str, name: str) -> int:
        """Of the file itself: a link's target was not sent."""
        try:
            found = (self.path / "attachments" / checked_name(client_id) / checked_name(name)).lstat()
        except OSError:
            return 0
        return found.st_size if stat.S_ISREG(found.st_mode) else 0

    def housekeep(self, round: int, *, clients: int, keep_rounds: int, tag: bool, finished: bool = False) -> None:
        """Nothing: a folder keeps every message, and its rounds need no tags."""

    def _publishing(self) -> AbstractContextManager[None]:
        """Keeps a second coordinator from cleaning up, or refreshing the root, in the middle of ours."""
        return storage.locked(self.path / "rounds" / ".lock")

    def _round(self, round: int) -> Path:
        return self.path / "rounds" / f"{round:06d}"

    def _updates(self, round: int, refinements: bool) -> Path:
        return self.path / ("refinements" if refinements else "updates") / f"{round:06d}"
