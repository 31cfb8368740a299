"""The folder mailbox: the embedded default, for one machine or a shared disk.

```
rounds/000000/  round.json adapter_model.safetensors adapter_config.json spec.json   immutable once renamed into place
rounds/000001/  round.json adapter_model.safetensors adapter_config.json frame.safetensors server_optimizer.safetensors
updates/000000/CLIENT.safetensors                                                    one per client, never overwritten
refinements/000000/CLIENT.safetensors                                                their second messages, likewise
metrics/000001/SOURCE.json
attachments/CLIENT/saliency.safetensors                                              what clients send beside messages
adapter_model.safetensors adapter_config.json README.md history.jsonl ...            derived from the newest round
control.json                                                                         who is enrolled; paused or not
```

Clients write there too, and any of them may leave anything there: a symbolic link is never followed, neither by who
reads nor by who writes, what is no plain file is never opened, and what stands in the way of a file is renamed.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedfstq_hf.errors import (
    MailboxError,
    MailboxUnavailableError,
    MessageError,
    RoundConflictError,
    UpdateConflictError,
)
from fedfstq_hf.federation import storage
from fedfstq_hf.federation.mailbox.posted_metrics import MAX_FILE_BYTES, MAX_SOURCES, Metrics
from fedfstq_hf.federation.mailbox.protocol import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    RECORD_FILE,
    RESIDUAL_FILE,
    SERVER_STATE_FILE,
    VARIATE_FILE,
    RootFiles,
    UpdateRef,
)
from fedfstq_hf.federation.storage import checked_name, is_name
from fedfstq_hf.text import parse_object, printable

logger = logging.getLogger(__name__)

PRUNED = (ADAPTER_FILE, SERVER_STATE_FILE, VARIATE_FILE, RESIDUAL_FILE)
"""Files of a round that are as large as the adapter, and that nobody needs but who goes back to it."""

_ROUND = re.compile(r"[0-9]{6,9}")
_CONTROL_FILE = "control.json"
_MESSAGE, _METRICS = ".safetensors", ".json"
_MAX_TENSORS, _MAX_TEXT = 4 * 10**9, 64 * 10**6
_MAX_MESSAGES = 100_000
"""Of one round; further ones, in the order of their names, are left out."""
_MAX_TOLD = 1000
_TRIES = 3
# of the disk, the network or this process: nobody's message is to blame
_OURS = {errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOTCONN, errno.ETIMEDOUT}


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
        self._told: set[str] = set()

    def set_patience(self, seconds: float) -> None:
        """A folder answers at once, or not at all."""

    def head(self) -> int | None:
        """The newest published round, None before round 0 was published. What is no whole round is passed over."""
        rounds = self.path / "rounds"
        try:
            with storage.opened_folder(rounds, self.path) as folder:
                names = sorted(filter(_ROUND.fullmatch, os.listdir(folder)), key=int, reverse=True)
                for name in names:
                    if _is_whole(name, folder):
                        return int(name)
                    self._tell(f"rounds/{name}", "it is no published round")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise MailboxError(f"{self.address} cannot be read as a mailbox: {error.strerror or error}.") from error
        return None

    def read(self, round: int, name: str, *, max_bytes: int | None = None) -> bytes:
        """A file of a published round."""
        try:
            return self._read(self._round(round) / name, max_bytes)
        except FileNotFoundError:
            if name in PRUNED and (self._round(round) / RECORD_FILE).exists():
                raise MailboxError(
                    f"Round {round} of {self.address} has no {name}: it was pruned, or had none. Name a newer one."
                ) from None
            raise MailboxError(
                f"{self.address} has no file {name} in round {round}. Expected a federation's folder made by "
                f"`fedfstq init {self.address} ...`."
            ) from None
        except OSError as error:
            raise MailboxError(f"Could not read {self._round(round) / name}: {error.strerror or error}.") from error

    def read_root(self, name: str) -> bytes | None:
        """A file at the root, None where there is none."""
        try:
            return self._read(self.path / name)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise MailboxError(f"Could not read {self.path / name}: {error.strerror or error}.") from error

    def publish(self, round: int, files: Mapping[str, bytes], root: RootFiles | None = None) -> None:
        """Publish a round by renaming its finished folder into place, then renew the root."""
        rounds = self.path / "rounds"
        storage.make_folder(rounds, durable=self.durable, below=self.path)
        with self._publishing(rounds):
            for _ in range(_TRIES):
                if storage.create_folder(self._round(round), files, durable=self.durable, below=self.path):
                    break
                head = self.head()
                if head is not None and round <= head:
                    raise RoundConflictError(f"Round {round} of {self.address} is published already.")
                storage.set_aside(self._round(round), below=self.path)
            else:
                raise MailboxError(
                    f"Somebody keeps putting something at {self._round(round)}, where round {round} is "
                    "to be published. Find out who may write there."
                )
        self.refresh_root(root)

    def refresh_root(self, root: RootFiles | None = None) -> None:
        """Copy the newest adapter to the root, where `PeftModel.from_pretrained` looks, beside what `root` makes.

        The round that `root` was made for may no longer be the newest; a coordinator that publishes renews it again.
        """
        head = self.head()
        if head is None:
            return
        with self._publishing(self.path):
            newest = self.head() or head  # another coordinator may have gone on while we waited
            files = {name: self.read(newest, name) for name in (ADAPTER_CONFIG_FILE, ADAPTER_FILE)}
            for name, data in {**(root(self._standing) if root else {}), **files}.items():
                if self._standing(name) != data:
                    path = self.path / name
                    storage.make_folder(path.parent, durable=self.durable, below=self.path)
                    storage.replace_file(path, data, durable=self.durable, below=self.path)

    def read_control(self) -> bytes | None:
        """`control.json`, None where it was never written."""
        return self.read_root(_CONTROL_FILE)

    def write_control(self, data: bytes, *, expected: bytes | None) -> bool:
        """Replace `control.json` if it still is `expected`."""
        storage.make_folder(self.path, durable=self.durable)
        lock = self.path / ".control.lock"
        with storage.locked(lock, below=self.path) as held:
            if not held:
                raise MailboxUnavailableError(f"Another process holds {lock}, and does not let go. Try again later.")
            if self.read_control() != expected:
                return False
            storage.replace_file(self.path / _CONTROL_FILE, data, durable=self.durable, below=self.path)
        return True

    def check_client(self, client_id: str) -> None:
        """Nothing: the folder's permissions decide, when a message is posted."""
        checked_name(client_id)

    def post_update(
        self, round: int, client_id: str, message: bytes, *, patience: float | None = None, refinement: bool = False
    ) -> None:
        """Post a message under the client's id; the same bytes again are accepted silently. A folder never waits."""
        folder = self._updates(round, refinement)
        target = folder / f"{checked_name(client_id)}{_MESSAGE}"
        storage.make_folder(folder, durable=self.durable, below=self.path)
        storage.remove_leftovers(folder, target.name, below=self.path)
        for _ in range(_TRIES):
            if storage.create_file(target, message, durable=self.durable, below=self.path):
                return
            try:
                present = storage.read_file(target, max_bytes=len(message), below=self.path)
            except storage.NotAFileError:
                storage.set_aside(target, below=self.path)
            except storage.TooLargeError:
                break
            except OSError as error:
                raise MailboxError(f"Could not read {target}: {error.strerror or error}.") from error
            else:
                if present == message:
                    return
                break
        raise UpdateConflictError(
            f"Client {client_id!r} already posted another message for round {round} of {self.address}. Is a second "
            "process running under the same client_id? Give each client an id and a state folder of its own."
        )

    def list_updates(
        self, round: int, clients: Sequence[str] | None = None, *, refinements: bool = False
    ) -> list[UpdateRef]:
        """The round's messages in client-id order."""
        folder, wanted = self._updates(round, refinements), None if clients is None else set(clients)
        place, refs = f"{folder.parent.name}/{folder.name}", []
        for client, found in self._scan(folder, _MESSAGE):
            if wanted is not None and client not in wanted:
                continue
            if (what := storage.kind(found.st_mode)) is not None:
                self._tell(f"{place}/{client}{_MESSAGE}", f"it is {what}, not a message")
                continue
            stamp = f"{found.st_ino}-{found.st_mtime_ns}"
            refs.append(UpdateRef(client, round, found.st_size, location=stamp, refinement=refinements))
        if len(refs) > _MAX_MESSAGES:
            self._tell(place, f"it holds more than {_MAX_MESSAGES} messages", "taken in part")
        return sorted(refs)[:_MAX_MESSAGES]

    def read_update(self, ref: UpdateRef, *, max_bytes: int) -> bytes:
        """One message, whole."""
        path = self._updates(ref.round, ref.refinement) / f"{checked_name(ref.client_id)}{_MESSAGE}"
        data = self._read_posted(path, max_bytes)
        if data is None:
            raise MessageError("It is no longer there.")
        return data

    def post_metric(self, round: int, source: str, metrics: Mapping[str, Any], *, client_id: str | None = None) -> None:
        """Write `metrics/ROUND/SOURCE.json`."""
        path = self.path / "metrics" / f"{round:06d}" / f"{checked_name(source)}{_METRICS}"
        storage.make_folder(path.parent, durable=self.durable, below=self.path)
        data = json.dumps(dict(metrics), sort_keys=True).encode()
        storage.replace_file(path, data, durable=self.durable, below=self.path)

    def read_metrics(self, clients: Sequence[str] = ()) -> dict[int, dict[str, dict[str, Any]]]:
        """All posted metrics: round -> source -> name -> value. What cannot be read is left out."""
        metrics: Metrics = {}
        head, folder = self.head(), self.path / "metrics"
        for name, _ in self._scan(folder, ""):
            if not _ROUND.fullmatch(name) or (head is not None and int(name) > head):
                continue
            sources = sorted(source for source, _ in self._scan(folder / name, _METRICS))
            for source in sources[:MAX_SOURCES]:
                path = folder / name / f"{source}{_METRICS}"
                try:
                    data = self._read_posted(path, MAX_FILE_BYTES)
                    found = parse_object(b"{}" if data is None else data, "The file", max_bytes=MAX_FILE_BYTES)
                except (MailboxError, MessageError) as error:
                    self._tell(f"metrics/{name}/{source}{_METRICS}", str(error))
                else:
                    metrics.setdefault(int(name), {})[source] = found
            if len(sources) > MAX_SOURCES:
                self._tell(f"metrics/{name}", f"it holds more than {MAX_SOURCES} files", "taken in part")
        return metrics

    def post_attachment(self, client_id: str, name: str, data: bytes) -> None:
        """Write `attachments/CLIENT/NAME`."""
        path = self.path / "attachments" / checked_name(client_id) / checked_name(name)
        storage.make_folder(path.parent, durable=self.durable, below=self.path)
        storage.replace_file(path, data, durable=self.durable, below=self.path)

    def read_attachment(self, client_id: str, name: str, *, max_bytes: int) -> bytes | None:
        """What lies there, None if nothing."""
        path = self.path / "attachments" / checked_name(client_id) / checked_name(name)
        return self._read_posted(path, max_bytes)

    def attachment_bytes(self, client_id: str, name: str) -> int:
        """Of the file itself: what a link leads to was not sent."""
        try:
            entries = dict(storage.scan(self.path / "attachments" / checked_name(client_id), self.path))
        except OSError:
            return 0
        found = entries.get(checked_name(name))
        return found.st_size if found is not None and stat.S_ISREG(found.st_mode) else 0

    def housekeep(self, round: int, *, clients: int, keep_rounds: int, tag: bool, finished: bool = False) -> None:
        """Nothing: a folder keeps every message, and its rounds need no tags."""

    def prune(self, keep: int) -> int:
        """Remove the large files of all rounds but the newest `keep` and the first; returns the bytes that are freed.

        Records and frames stay, so clients go on. There is no way back to a pruned round.
        """
        freed = 0
        for round in range(1, (self.head() or 0) - max(keep, 1) + 1):
            for path in (self._round(round) / name for name in PRUNED):
                with contextlib.suppress(FileNotFoundError):
                    size = path.stat(follow_symlinks=False).st_size
                    path.unlink()
                    freed += size
        return freed

    def _read(self, path: Path, max_bytes: int | None = None) -> bytes:
        """A file that the coordinator wrote. Raises `OSError`."""
        most = _MAX_TENSORS if path.suffix == _MESSAGE else _MAX_TEXT
        return storage.read_file(path, max_bytes=most if max_bytes is None else max_bytes, below=self.path)

    def _standing(self, name: str) -> bytes | None:
        """A file at the root that is going to be renewed; None also where something else stands in its place."""
        try:
            return self._read(self.path / name)
        except FileNotFoundError:
            return None
        except storage.NotAFileError as error:
            self._tell(name, str(error.strerror))
            return None
        except OSError as error:
            raise MailboxError(f"Could not read {self.path / name}: {error.strerror or error}.") from error

    def _read_posted(self, path: Path, max_bytes: int) -> bytes | None:
        """A file that a client wrote, None where there is none.

        Raises:
            MessageError: it cannot be read, or is larger.
        """
        try:
            return storage.read_file(path, max_bytes=max_bytes, below=self.path)
        except FileNotFoundError:
            return None
        except storage.TooLargeError as error:
            raise MessageError(f"It has {error.num_bytes} bytes; at most {max_bytes} are taken.") from error
        except OSError as error:
            if error.errno in _OURS:
                raise MailboxUnavailableError(f"Could not read {path}: {error.strerror}.") from error
            raise MessageError(f"It cannot be read: {error.strerror or error}.") from error

    def _scan(self, folder: Path, suffix: str) -> Iterator[tuple[str, os.stat_result]]:
        """What clients put into a folder under a proper name with that suffix, and what each is itself."""
        try:
            entries = storage.scan(folder, self.path)
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno in _OURS:
                raise MailboxUnavailableError(f"Could not read {folder}: {error.strerror}.") from error
            self._tell(str(folder.relative_to(self.path)), error.strerror or str(error))
            return
        for name, found in entries:
            if name.endswith(suffix) and is_name(stem := name.removesuffix(suffix)):
                yield stem, found

    def _tell(self, what: str, why: str, how: str = "left out") -> None:
        """Say once that something is passed over. Of a flood the first ones are named."""
        if what in self._told or len(self._told) > _MAX_TOLD:
            return
        self._told.add(what)
        if len(self._told) > _MAX_TOLD:
            what, why = "More of the same", "further ones are not named"
        logger.warning("%s in %s is %s: %s", what, printable(self.address), how, printable(why))

    @contextlib.contextmanager
    def _publishing(self, folder: Path) -> Iterator[None]:
        """Keeps a second coordinator from cleaning up `folder`, or refreshing the root, in the middle of ours."""
        lock = self.path / "rounds" / ".lock"
        with storage.locked(lock, below=self.path) as held:
            if held:
                storage.remove_leftovers(folder, below=self.path)
            else:  # whoever may read the file can hold its lock; what is published is atomic without it
                logger.warning("Another process holds %s; going on without it.", lock)
            yield

    def _round(self, round: int) -> Path:
        return self.path / "rounds" / f"{round:06d}"

    def _updates(self, round: int, refinements: bool) -> Path:
        return self.path / ("refinements" if refinements else "updates") / f"{round:06d}"


def _is_whole(name: str, rounds: int) -> bool:
    """Whether an entry of the folder `rounds` is a published round."""
    try:
        modes = [
            os.stat(path, dir_fd=rounds, follow_symlinks=False).st_mode
            for path in (name, f"{name}/{RECORD_FILE}", f"{name}/{ADAPTER_FILE}")
        ]
    except OSError:
        return False
    return stat.S_ISDIR(modes[0]) and all(map(stat.S_ISREG, modes[1:]))
