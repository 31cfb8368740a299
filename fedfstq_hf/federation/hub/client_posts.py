"""What clients post: messages, metrics and attachments, written and read at the places that the layout gives them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import HfApi

from fedfstq_hf.errors import MailboxError, MailboxUnavailableError
from fedfstq_hf.federation.control import Control
from fedfstq_hf.federation.hub import address as paths
from fedfstq_hf.federation.hub.global_repo import GlobalRepo
from fedfstq_hf.federation.hub.json_files import MAX_METRICS_BYTES, dump, parse_metrics, with_metric
from fedfstq_hf.federation.hub.layouts import LAYOUTS, Layout, Place
from fedfstq_hf.federation.hub.message_cache import MessageCache
from fedfstq_hf.federation.hub.posting import open_pull_request, post, push_file
from fedfstq_hf.federation.hub.rounds import TIDY_EVERY, tidy
from fedfstq_hf.federation.hub.waiting import Patience
from fedfstq_hf.federation.mailbox import UpdateRef, checked_name

logger = logging.getLogger(__name__)

_FORMAT = 1


class ClientPosts:
    """The clients' side of a Hub mailbox.

    Args:
        global_repo: says which layout the federation has, and who is enrolled.
        private: whether new repos are private.
    """

    def __init__(
        self, global_repo: GlobalRepo, address: paths.HubAddress, api: HfApi, patience: Patience, *, private: bool
    ) -> None:
        self._global = global_repo
        self._address = address
        self._api = api
        self._patience = patience
        self._private = private
        self._layout: Layout | None = None
        self._warned: set[str] = set()
        self._found: dict[tuple[int, bool, str], UpdateRef] = {}
        self._messages = MessageCache()

    def found(self, layout: str) -> bytes:
        """Make what the clients of a new federation share; returns the layout file that names the layout."""
        self._open(LAYOUTS[layout]).found()
        return dump({"format": _FORMAT, "layout": layout})

    # -- messages ---------------------------------------------------------------------------------------------------

    def post_update(
        self, round: int, client_id: str, message: bytes, *, patience: float | None, refinement: bool = False
    ) -> None:
        """Post a client's message where its layout says."""
        layout, enrolment = self._layouts(), self._enrolments().enrolment(checked_name(client_id))
        place = layout.own_place(client_id, enrolment)
        if place is None:  # also for a refinement: its preview may not have come through
            repo = layout.repo(self._address.mailbox_repo)
            open_pull_request(
                repo,
                self._api,
                round,
                client_id,
                message,
                lambda: layout.own_place(client_id, enrolment),
                seconds=patience,
                refinement=refinement,
            )
            return
        post(place, round, client_id, message, seconds=patience, refinement=refinement)

    def list_updates(self, round: int, clients: Sequence[str] | None, *, refinements: bool = False) -> list[UpdateRef]:
        """The round's messages: one request for each client that none was found of yet, or one for all."""
        layout = self._layouts()
        listed = layout.list_folder(round, refinements)
        if listed is not None:
            for ref in listed:
                self._found.setdefault((round, refinements, ref.client_id), ref)
        else:
            for client in layout.clients() if clients is None else clients:
                if (round, refinements, client) not in self._found:
                    self._look_for(round, refinements, client)
        return sorted(
            ref
            for (of_round, second, client), ref in self._found.items()
            if (of_round, second) == (round, refinements) and (clients is None or client in clients)
        )

    def read_update(self, ref: UpdateRef, *, max_bytes: int) -> bytes:
        """One message; kept on disk, since a round reads it twice."""
        kept = self._messages.get(ref.sha256)
        if kept is not None:
            return kept
        place = self._place(ref.client_id)
        if place is None:
            raise MailboxError(f"The pull request of client {ref.client_id} was closed; its update cannot be read.")
        path = place.update_path(ref.round, ref.client_id, ref.refinement)
        file = place.repo.read(path, revision=ref.location or place.revision, max_bytes=max_bytes, squashed=True)
        if file is None:  # the client squashed its history: the same file is on its branch
            file = place.repo.read(path, revision=place.revision, max_bytes=max_bytes)
        if file is None or (ref.sha256 and hashlib.sha256(file.data).hexdigest() != ref.sha256):
            raise MailboxError(
                f"The message of client {ref.client_id} for round {ref.round} is no longer what it was when it was "
                "listed. Nothing was published; start the coordinator again."
            )
        self._messages.keep(ref.sha256, file.data)
        return file.data

    def forget(self, until: int) -> None:
        """Drop what is held of the messages of rounds up to `until`."""
        self._found = {key: ref for key, ref in self._found.items() if key[0] > until}
        self._messages.keep_only({ref.sha256 for ref in self._found.values()})

    def tidy(self, round: int, clients: int, keep_rounds: int, *, finished: bool) -> None:
        """Remove old messages from a shared repo; after the last round leave nothing open."""
        layout = self._layouts()
        if layout.name == "shared" and round and round % TIDY_EVERY == 0:
            with contextlib.suppress(MailboxError):
                tidy(layout.repo(self._address.mailbox_repo), round, clients, keep_rounds)
        if finished:
            with contextlib.suppress(MailboxError):
                layout.close()

    # -- metrics and attachments ------------------------------------------------------------------------------------

    def post_metric(self, round: int, source: str, metrics: Mapping[str, Any], client_id: str) -> None:
        """Add one metric to those at the client's place."""
        place = self._layouts().own_place(client_id, self._enrolments().enrolment(client_id))
        if place is None:
            raise MailboxError(f"Client {client_id!r} has no pull request yet. Post metrics after its first update.")
        path = place.metrics_path(client_id)
        file = place.repo.read(path, revision=place.revision, max_bytes=MAX_METRICS_BYTES)
        data = with_metric(None if file is None else file.data, round, source, metrics)
        push_file(place, path, data, "Metrics")

    def read_metrics(self, clients: Sequence[str]) -> dict[int, dict[str, dict[str, Any]]]:
        """What these clients posted, each source named after its client: round -> source@client -> name -> value."""
        found: dict[int, dict[str, dict[str, Any]]] = {}
        for client in clients:
            place = self._place(client)
            if place is None or place.repo.state(place.metrics_path(client), revision=place.revision) is None:
                continue
            file = place.repo.read(place.metrics_path(client), revision=place.revision, max_bytes=MAX_METRICS_BYTES)
            for round, sources in parse_metrics(None if file is None else file.data).items():
                for source, values in sources.items():
                    found.setdefault(round, {})[f"{source}@{client}"] = values
        return found

    def post_attachment(self, client_id: str, name: str, data: bytes) -> None:
        """Post to the client's place."""
        place = self._layouts().own_place(checked_name(client_id), self._enrolments().enrolment(client_id))
        if place is None:
            raise MailboxError(f"Client {client_id!r} has no pull request yet; its first update opens one.")
        push_file(place, place.attachment_path(client_id, checked_name(name)), data, f"Attach {name}")

    def read_attachment(self, client_id: str, name: str, *, max_bytes: int) -> bytes | None:
        """What lies at the client's place."""
        place = self._place(client_id)
        if place is None:
            return None
        path = place.attachment_path(client_id, checked_name(name))
        file = place.repo.read(path, revision=place.revision, max_bytes=max_bytes)
        return None if file is None else file.data

    def attachment_bytes(self, client_id: str, name: str) -> int:
        """Of what lies at the client's place."""
        place = self._place(client_id)
        if place is None:
            return 0
        path = place.attachment_path(client_id, checked_name(name))
        files = place.repo.list(path.rpartition("/")[0], revision=place.revision)
        return next((file.size for file in files if file.path == path), 0)

    # -- inside -----------------------------------------------------------------------------------------------------

    def _open(self, layout: type[Layout]) -> Layout:
        return layout(self._address, self._api, self._patience, private=self._private)

    def _layouts(self) -> Layout:
        if self._layout is None:
            data = self._global.read_layout()
            try:
                fields = json.loads(data or b"")
                layout = LAYOUTS[fields["layout"]] if fields["format"] == _FORMAT else None
            except (ValueError, KeyError, TypeError):
                layout = None
            if layout is None:
                address = self._global.address
                raise MailboxError(
                    f"{address} does not say how its clients' messages are laid out ({paths.LAYOUT_PATH} is "
                    "missing, damaged or of a newer version). Restore it from the repo's history, or update fedfstq_hf."
                )
            self._layout = self._open(layout)
        return self._layout

    def _enrolments(self) -> Control:
        return Control.from_json(self._global.read_control())

    def _place(self, client_id: str) -> Place | None:
        return self._layouts().place(client_id, self._enrolments().enrolment(client_id))

    def _look_for(self, round: int, refinements: bool, client: str) -> None:
        try:
            place = self._place(client)
            if place is None:
                return
            path = place.update_path(round, client, refinements)
            state = place.repo.state(path, revision=place.revision)
        except MailboxUnavailableError:
            raise
        except MailboxError as error:  # one client's closed repo must not stop the others
            if client not in self._warned:
                logger.warning("Cannot look for the updates of client %s: %s", client, error)
                self._warned.add(client)
            return
        if state is not None:
            sha256 = state.etag if len(state.etag) == 64 else ""
            self._found[round, refinements, client] = UpdateRef(
                client, round, state.size, sha256, state.commit, refinements
            )
