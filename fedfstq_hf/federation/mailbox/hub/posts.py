"""What clients posted: messages, metrics and attachments, read at the places that the layout gives them.

Whatever one client did to its place (deleted, hidden, renamed or broke it, filled it with something else) concerns that
client alone: it is left out of a look, its message is refused, its metrics are dropped.
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from fedfstq_hf.errors import MailboxError, MailboxUnavailableError, MessageError
from fedfstq_hf.federation.mailbox.hub.files import MAX_METRICS_BYTES, HubAddress, parse_metrics
from fedfstq_hf.federation.mailbox.hub.global_repo import GlobalRepo
from fedfstq_hf.federation.mailbox.hub.layouts import Layout
from fedfstq_hf.federation.mailbox.hub.places import MARKER_PATH, Marker, Place, read_marker
from fedfstq_hf.federation.mailbox.hub.repo import RemoteFile
from fedfstq_hf.federation.mailbox.protocol import UpdateRef
from fedfstq_hf.federation.storage import checked_name, is_name

logger = logging.getLogger(__name__)

CLIENT_SECONDS = 5.0
"""How long a request to one client's place is repeated: others wait meanwhile."""
_LOOK_SECONDS = 30.0  # the same for all places of one look together

T = TypeVar("T")
_Metrics = dict[int, dict[str, dict[str, Any]]]


class ClientPosts:
    """The messages of a federation's clients, for whoever reads them.

    Args:
        global_repo: says who is enrolled.
        layout: opens the federation's layout.
    """

    def __init__(self, global_repo: GlobalRepo, layout: Callable[[], Layout], address: HubAddress) -> None:
        self._global = global_repo
        self._layout = layout
        self._address = address
        self._found: dict[tuple[int, bool], dict[str, UpdateRef]] = {}
        self._messages = MessageCache()
        self._metrics: dict[str, tuple[str, _Metrics]] = {}  # client -> etag, what the file holds
        self._owners: dict[str, Marker] = {}  # repo -> its marker
        self._silent: set[str] = set()
        self._warned: dict[str, str] = {}

    # -- messages ---------------------------------------------------------------------------------------------------

    def list_updates(self, round: int, clients: Sequence[str] | None, *, refinements: bool = False) -> list[UpdateRef]:
        """The round's messages: one request for each client that none was found of yet, or one for all."""
        layout = self._layout()
        layout.look()
        found = self._found.setdefault((round, refinements), {})
        listed = layout.list_folder(round, refinements)
        if listed is not None:
            for ref in listed:
                found.setdefault(ref.client_id, ref)
        else:
            until = time.monotonic() + _LOOK_SECONDS
            for client in layout.clients() if clients is None else clients:
                if client in found:
                    continue
                message = self._look_for(round, refinements, client, until)
                if message is not None:
                    found[client] = message
        wanted = found if clients is None else found.keys() & set(clients)
        return sorted(found[client] for client in wanted)

    def read_update(self, ref: UpdateRef, *, max_bytes: int) -> bytes:
        """One message; kept on disk, since a round reads it twice.

        Raises:
            MessageError: it is not what was listed any more, too large, or not there; or the client's place does not
                answer, though the federation's own repo does.
        """
        kept = self._messages.get(ref)
        if kept is not None:
            return kept
        try:
            file = self._ask_twice(ref.client_id, partial(self._download, ref, max_bytes))
        except MailboxUnavailableError:
            raise
        except MailboxError as error:
            raise MessageError(f"It cannot be read. {error}") from None
        if file is None or (ref.sha256 and hashlib.sha256(file.data).hexdigest() != ref.sha256):
            raise MessageError("It is no longer what it was when it was listed.")
        self._messages.keep(ref, file.data)
        return file.data

    def forget(self, until: int) -> None:
        """Drop what is held of the messages of rounds up to `until`."""
        self._found = {key: refs for key, refs in self._found.items() if key[0] > until}
        self._messages.keep_only(ref for refs in self._found.values() for ref in refs.values())

    def tidy(self, round: int, clients: int, keep_rounds: int, *, finished: bool) -> None:
        """Remove old messages from a shared repo; after the last round leave nothing open."""
        layout = self._layout()
        try:
            layout.tidy(round, clients=clients, keep_rounds=keep_rounds)
        except MailboxError as error:
            logger.warning("%s is not tidied: %s", self._address.mailbox_repo, error)
        if finished:
            with suppress(MailboxError):
                layout.close()

    # -- metrics and attachments ------------------------------------------------------------------------------------

    def read_metrics(self, clients: Sequence[str]) -> _Metrics:
        """What these clients posted, each source named after its client: round -> source@client -> name -> value.

        One request for each client whose metrics are the same as before. What cannot be read is left out.
        """
        found: _Metrics = {}
        until = time.monotonic() + _LOOK_SECONDS
        for client in clients:
            try:
                metrics = self._ask(client, until, partial(self._metrics_of, client))
            except (MailboxError, MessageError) as error:
                self._warn(f"{client}/metrics", f"The metrics of client {client} are left out: {error}")
                continue
            for round, sources in metrics.items():
                for source, values in sources.items():
                    found.setdefault(round, {})[f"{source}@{client}"] = values
        return found

    def read_attachment(self, client_id: str, name: str, *, max_bytes: int) -> bytes | None:
        """What lies at the client's place. Raises `MessageError` if it is too large or cannot be read."""

        def read(seconds: float) -> RemoteFile | None:
            place = self._place(checked_name(client_id))
            if place is None:
                return None
            path = place.attachment_path(client_id, checked_name(name))
            file = place.repo.read(path, revision=place.revision, max_bytes=max_bytes, seconds=seconds)
            if file is not None:
                self._check_owner(client_id, place, place.revision, seconds)
            return file

        try:
            file = self._ask_twice(client_id, read)
        except MailboxUnavailableError:
            raise
        except MailboxError as error:
            raise MessageError(f"{name} of client {client_id} cannot be read. {error}") from None
        return None if file is None else file.data

    def attachment_bytes(self, client_id: str, name: str) -> int:
        """Of what lies at the client's place; 0 where that cannot be told, which is logged."""

        def look(seconds: float) -> int:
            place = self._place(client_id)
            if place is None:
                return 0
            path = place.attachment_path(checked_name(client_id), checked_name(name))
            state = place.repo.state(path, revision=place.revision, seconds=seconds)
            return 0 if state is None else state.size

        try:
            return self._ask(client_id, time.monotonic() + CLIENT_SECONDS, look)
        except MailboxError as error:
            self._warn(f"{client_id}/{name}", f"The bytes of {name} of client {client_id} are not counted: {error}")
            return 0

    # -- inside -----------------------------------------------------------------------------------------------------

    def _place(self, client_id: str) -> Place | None:
        return self._layout().place(client_id, self._global.control().enrolment(client_id))

    def _look_for(self, round: int, refinements: bool, client: str, until: float) -> UpdateRef | None:
        """The client's message, if one is there and its place answers."""
        if not is_name(client):
            return None

        def look(seconds: float) -> UpdateRef | None:
            place = self._place(client)
            if place is None:
                return None
            self._refuse_anothers(client, place)
            path = place.update_path(round, client, refinements)
            state = place.repo.state(path, revision=place.revision, seconds=seconds)
            if state is None:
                return None
            self._check_owner(client, place, state.commit, seconds)
            sha256 = state.etag if len(state.etag) == 64 else ""
            return UpdateRef(client, round, state.size, sha256, state.commit, refinements)

        try:
            return self._ask(client, until, look)
        except MailboxError as error:
            self._warn(client, f"Client {client} is left out of this look, and looked for at the next: {error}")
            return None

    def _download(self, ref: UpdateRef, max_bytes: int, seconds: float) -> RemoteFile | None:
        place = self._place(ref.client_id)
        if place is None:
            raise MailboxError("Its pull request was closed.")
        path = place.update_path(ref.round, ref.client_id, ref.refinement)
        file = place.repo.read(
            path, revision=ref.location or place.revision, max_bytes=max_bytes, squashed=True, seconds=seconds
        )
        if file is None:  # the client squashed its history: the same file is on its branch
            file = place.repo.read(path, revision=place.revision, max_bytes=max_bytes, seconds=seconds)
        return file

    def _metrics_of(self, client: str, seconds: float) -> _Metrics:
        place = self._place(client)
        if place is None:
            return {}
        self._refuse_anothers(client, place)
        path = place.metrics_path(client)
        state = place.repo.state(path, revision=place.revision, seconds=seconds)
        if state is None:
            return {}
        etag, metrics = self._metrics.get(client, ("", {}))
        if state.etag != etag:
            self._check_owner(client, place, state.commit, seconds)
            file = place.repo.read(path, revision=state.commit, max_bytes=MAX_METRICS_BYTES, seconds=seconds)
            data = None if file is None else file.data
            metrics = parse_metrics(data, f"client {client}", max_bytes=MAX_METRICS_BYTES)
            self._metrics[client] = (state.etag, metrics)
        return metrics

    # -- one client's troubles --------------------------------------------------------------------------------------

    def _ask(self, client: str, until: float, request: Callable[[float], T]) -> T:
        """`request(seconds)` to a client's place: the later in a look the shorter, once where it was silent before."""
        left = 0.0 if client in self._silent else until - time.monotonic()
        try:
            answer = request(max(0.0, min(CLIENT_SECONDS, left)))
        except MailboxUnavailableError:
            self._silent.add(client)
            raise
        self._silent.discard(client)
        return answer

    def _ask_twice(self, client: str, request: Callable[[float], T]) -> T:
        """The same; where the client's place is silent, again once the federation's own repo answers.

        Raises:
            MailboxUnavailableError: the federation's repo does not answer either.
            MessageError: it does, and the client's place does not.
        """
        try:
            return self._ask(client, time.monotonic() + CLIENT_SECONDS, request)
        except MailboxUnavailableError:
            self._global.wait_for_answer()  # the whole Hub may be out, which is nobody's fault
        self._silent.discard(client)
        try:
            return self._ask(client, time.monotonic() + CLIENT_SECONDS, request)
        except MailboxUnavailableError as error:
            raise MessageError(f"Its place does not answer, though the federation's repo does. {error}") from None

    def _refuse_anothers(self, client: str, place: Place) -> None:
        """Raise `MailboxError` if the place is known to be another client's, or another federation's."""
        there, expected = self._owners.get(place.repo.repo_id), self._layout().marker(client)
        if there is not None and not there.same(expected):
            raise MailboxError(f"{place.repo.repo_id} belongs to {there}, not to {expected}.")

    def _check_owner(self, client: str, place: Place, revision: str, seconds: float) -> None:
        """Raise `MailboxError` unless the marker of the client's own repo names it; read once."""
        if self._layout().marker(client).client_id is None:
            return  # a repo that all share was founded with its marker
        if place.repo.repo_id not in self._owners:
            marker = read_marker(place.repo, revision=revision, seconds=seconds)
            if marker is None:
                raise MailboxError(f"{place.repo.repo_id} was not made by a client: it has no {MARKER_PATH}.")
            self._owners[place.repo.repo_id] = marker
        self._refuse_anothers(client, place)

    def _warn(self, about: str, text: str) -> None:
        """Log it, unless it is the same as the last time."""
        if self._warned.get(about) != text:
            logger.warning("%s", text)
            self._warned[about] = text


class MessageCache:
    """Messages by the reference they were listed under, in a temporary folder that goes with the process.

    A round reads each twice, and must hold only one in memory. The second reading is the first one's bytes, whatever
    the sender did in between.
    """

    def __init__(self) -> None:
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._names: dict[UpdateRef, str] = {}

    def get(self, ref: UpdateRef) -> bytes | None:
        """What was kept of a message."""
        path = self._path(ref)
        return path.read_bytes() if path is not None and path.is_file() else None

    def keep(self, ref: UpdateRef, data: bytes) -> None:
        """Keep a message that was read."""
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="fedfstq-")
        self._names[ref] = hashlib.sha256(data).hexdigest()
        (Path(self._folder.name) / self._names[ref]).write_bytes(data)

    def keep_only(self, wanted: Iterable[UpdateRef]) -> None:
        """Remove all others."""
        self._names = {ref: self._names[ref] for ref in wanted if ref in self._names}
        if self._folder is not None:
            kept = set(self._names.values())
            for path in Path(self._folder.name).iterdir():
                if path.name not in kept:
                    path.unlink(missing_ok=True)

    def _path(self, ref: UpdateRef) -> Path | None:
        if self._folder is None or ref not in self._names:
            return None
        return Path(self._folder.name) / self._names[ref]
