"""The Hub mailbox: a federation that no one has to host.

```
ORG/RUN               adapter_model.safetensors adapter_config.json README.md        what plain PEFT and people read
                      fedfstq/  mailbox.json spec.json control.json round.json history.jsonl metrics.json
                                server_optimizer.safetensors rounds/000012/{round.json,update.safetensors}
ORG/RUN-CLIENT        rounds/000012.safetensors metrics.json                         layout own: one repo per client
ORG/RUN-mailbox       rounds/000012/deltas/CLIENT.safetensors metrics/CLIENT.json    layout shared; and the repo that
                                                                                     pull requests are made to
```

One commit per round, on top of the one it was made from: two coordinators cannot both publish a round. The adapter and
the server optimizer's state of earlier rounds lie in the tags and commits of those rounds.
"""

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
from fedfstq_hf.federation.hub.json_files import (
    MAX_BYTES,
    MAX_METRICS_BYTES,
    dump,
    parse_metrics,
    round_in,
    with_metric,
)
from fedfstq_hf.federation.hub.layouts import LAYOUTS, Layout, Place
from fedfstq_hf.federation.hub.message_cache import MessageCache
from fedfstq_hf.federation.hub.posting import open_pull_request, post, push_file
from fedfstq_hf.federation.hub.publishing import Reader, Swap, refuse_foreign, round_taken
from fedfstq_hf.federation.hub.repo import FileState, HubRepo
from fedfstq_hf.federation.hub.rounds import TIDY_EVERY, find_round, tag_round, tidy
from fedfstq_hf.federation.hub.waiting import DEFAULT_PATIENCE, Patience
from fedfstq_hf.federation.mailbox import (
    ADAPTER_CONFIG_FILE,
    RECORD_FILE,
    SPEC_FILE,
    RootFiles,
    UpdateRef,
    checked_name,
)

logger = logging.getLogger(__name__)

_FORMAT = 1
_FIRST_LOOKS = (0.5, 1.0, 2.0)  # seconds


class HubMailbox:
    """A mailbox in Hub repos; many may be open on the same federation, and any may be killed at any moment.

    Args:
        address: `hf://org/repo`, the global repo.
        create: the federation may be missing: it is going to be founded here.
        layout: of a new federation.
        private: whether new repos are private.
        token: where it is not in `HF_TOKEN` or stored by `hf auth login`.
        patience: seconds for which a request is repeated while the Hub is busy, silent or broken.
    """

    def __init__(
        self,
        address: str,
        *,
        create: bool = False,
        layout: str | None = None,
        private: bool = True,
        token: str | None = None,
        patience: float = DEFAULT_PATIENCE,
    ) -> None:
        self.address = address
        self._address = paths.parse_address(address)
        self._api = HfApi(token=token, library_name="fedfstq_hf")
        self._patience = Patience(patience)
        self._repo = HubRepo(self._address.repo_id, self._api, self._patience)
        self._create = create
        self._new_layout = layout or "own"
        self._private = private
        self._layout: Layout | None = None
        self._head: int | None = None
        self._head_etag = ""
        self._commit: str | None = None
        self._control: tuple[str, bytes | None] | None = None
        self._first_control: bytes | None = None
        self._warned: set[str] = set()
        self._kept: dict[str, bytes] = {}
        self._found: dict[tuple[int, str], UpdateRef] = {}
        self._messages = MessageCache()

    # -- rounds -----------------------------------------------------------------------------------------------------

    def head(self) -> int | None:
        """The newest published round; one HEAD request while nothing is new. It never goes back."""
        state = self._repo.state(paths.HEAD_PATH)
        if state is None and self._head is None and not self._create:
            state = self._first_look()
        if state is None:
            if self._head is None and not self._create and not self._repo.exists():
                raise MailboxError(
                    f"There is no repo {self._address.repo_id}, or this token may not see it. Check the address; type "
                    "`hf auth login` (or set HF_TOKEN) with an account that may read it; or found a federation with "
                    f"`fedfstq init {self.address} ...`."
                )
            return self._head
        if state.etag != self._head_etag:
            file = self._repo.read(paths.HEAD_PATH, revision=state.commit, max_bytes=MAX_BYTES)
            round = round_in(file.data if file is not None else None, self.address)
            if self._head is None or round >= self._head:
                self._head, self._head_etag, self._commit = round, state.etag, state.commit
        elif self._head is not None:
            self._commit = state.commit
        return self._head

    def _first_look(self) -> FileState | None:
        """What is read back may lag: a federation that was founded a moment ago is given some seconds to show."""
        for wait in _FIRST_LOOKS:
            self._patience.sleep(wait)
            state = self._repo.state(paths.HEAD_PATH)
            if state is not None:
                return state
        return None

    def read(self, round: int, name: str) -> bytes:
        """A file of a published round, at the commit that was seen to hold it."""
        path = paths.round_path(round, name) or paths.head_path(name)
        constant = name in (SPEC_FILE, ADAPTER_CONFIG_FILE)
        if constant and path in self._kept:
            return self._kept[path]
        if self._head is None or round > self._head:
            self.head()
        revision = self._commit
        if paths.round_path(round, name) is None and not constant and round != self._head:
            revision = find_round(self._repo, round)
        file = self._repo.read(path, revision=revision or "main") if self._head is not None else None
        if file is None:
            raise MailboxError(
                f"{self.address} has no file {name} of round {round}. Expected a federation made by "
                f"`fedfstq init {self.address} ...`."
            )
        if constant:
            self._kept[path] = file.data
        return file.data

    def read_root(self, name: str) -> bytes | None:
        """A file for people as it is now, None where there is none."""
        file = self._repo.read(paths.root_path(name), revision=self._commit or "main")
        return None if file is None else file.data

    def publish(self, round: int, files: Mapping[str, bytes], root: RootFiles | None = None) -> None:
        """Publish a round in one commit on top of the previous one.

        What people changed in between (the card, say) is left as it is: the commit is then made again on top of it.
        """
        written = paths.publication(round, dict(files))
        if round == 0:
            self._found_repos()
            written[paths.LAYOUT_PATH] = dump({"format": _FORMAT, "layout": self._new_layout})
            if self._first_control is not None:
                written[paths.CONTROL_PATH] = self._first_control
        record = files[RECORD_FILE]

        def make(read: Reader) -> dict[str, bytes]:
            made = {} if root is None else root(lambda name: read(paths.root_path(name)))
            return {**{paths.root_path(name): data for name, data in made.items()}, **written}

        def check(read: Reader) -> bool:
            present = read(paths.HEAD_PATH)
            if present == record:
                return True  # an answer was lost, the commit was not
            if present is not None and round_in(present, self.address) >= round:
                raise round_taken(round, self.address)
            if present is None:
                refuse_foreign(read, written, self._address.repo_id)
            return False

        # Only a commit that was seen to hold the previous round can be built on without looking.
        parent = self._commit if self._head == round - 1 and round > 0 else None
        commit = Swap(self._repo, f"Round {round}", make, check, parent).run()
        self._head, self._head_etag, self._commit = round, "", commit

    def refresh_root(self, root: RootFiles | None = None) -> None:
        """Renew the files for people, where they are not what they should be."""
        if root is None or self._head is None:
            return
        head = self._head

        def changed(read: Reader) -> dict[str, bytes]:
            made = {paths.root_path(name): data for name, data in root(lambda n: read(paths.root_path(n))).items()}
            return {path: data for path, data in made.items() if read(path) != data}

        def check(read: Reader) -> bool:  # nothing to do, or a newer round that has its own files
            return round_in(read(paths.HEAD_PATH), self.address) != head or not changed(read)

        self._commit = Swap(self._repo, "Model card", changed, check).run()

    # -- control ----------------------------------------------------------------------------------------------------

    def read_control(self) -> bytes | None:
        """The control file as of the last look at the head."""
        if self._commit is None:
            self.head()
        commit = self._commit
        if commit is None:
            return self._first_control
        if self._control is None or self._control[0] != commit:
            file = self._repo.read(paths.CONTROL_PATH, revision=commit, max_bytes=MAX_BYTES)
            self._control = (commit, None if file is None else file.data)
        return self._control[1]

    def write_control(self, data: bytes, *, expected: bytes | None) -> bool:
        """Replace the control file if it still is `expected`."""
        if self._head is None and self._create:  # it goes with the first commit, or not at all
            self._first_control = data
            return True
        present: list[bytes | None] = []

        def check(read: Reader) -> bool:
            present[:] = [read(paths.CONTROL_PATH)]
            return present[0] != expected

        commit = Swap(self._repo, "Control", lambda read: {paths.CONTROL_PATH: data}, check).run()
        if self._head is not None:
            self._commit = commit
        written = present[0] in (expected, data)
        self._control = (commit, data if written else present[0])
        return written

    # -- updates ----------------------------------------------------------------------------------------------------

    def post_update(self, round: int, client_id: str, message: bytes, *, patience: float | None = None) -> None:
        """Post a client's message where its layout says."""
        layout, enrolment = self._layouts(), self._enrolments().enrolment(checked_name(client_id))
        place = layout.own_place(client_id, enrolment)
        if place is None:
            repo = layout.repo(self._address.mailbox_repo)
            open_pull_request(
                repo,
                self._api,
                round,
                client_id,
                message,
                lambda: layout.own_place(client_id, enrolment),
                seconds=patience,
            )
            return
        post(place, round, client_id, message, seconds=patience)

    def list_updates(self, round: int, clients: Sequence[str] | None = None) -> list[UpdateRef]:
        """The round's messages: one request for each client that none was found of yet, or one for all."""
        layout = self._layouts()
        listed = layout.list_folder(round)
        if listed is not None:
            for ref in listed:
                self._found.setdefault((round, ref.client_id), ref)
        else:
            for client in layout.clients() if clients is None else clients:
                if (round, client) not in self._found:
                    self._look_for(round, client)
        return sorted(
            ref
            for (of_round, client), ref in self._found.items()
            if of_round == round and (clients is None or client in clients)
        )

    def read_update(self, ref: UpdateRef, *, max_bytes: int) -> bytes:
        """One message; kept on disk, since a round reads it twice."""
        kept = self._messages.get(ref.sha256)
        if kept is not None:
            return kept
        place = self._place(ref.client_id)
        if place is None:
            raise MailboxError(f"The pull request of client {ref.client_id} was closed; its update cannot be read.")
        path = place.update_path(ref.round, ref.client_id)
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

    # -- metrics and housekeeping -----------------------------------------------------------------------------------

    def post_metric(self, round: int, source: str, metrics: Mapping[str, Any], *, client_id: str | None = None) -> None:
        """Post to the global repo, or to the place of `client_id` where that is given."""
        checked_name(source)
        if client_id is None:

            def merged(read: Reader) -> dict[str, bytes]:
                return {paths.METRICS_PATH: with_metric(read(paths.METRICS_PATH), round, source, metrics)}

            def check(read: Reader) -> bool:
                return read(paths.METRICS_PATH) == merged(read)[paths.METRICS_PATH]

            self._commit = Swap(self._repo, "Metrics", merged, check).run()
            return
        place = self._layouts().own_place(client_id, self._enrolments().enrolment(client_id))
        if place is None:
            raise MailboxError(f"Client {client_id!r} has no pull request yet. Post metrics after its first update.")
        path = place.metrics_path(client_id)
        file = place.repo.read(path, revision=place.revision, max_bytes=MAX_METRICS_BYTES)
        data = with_metric(None if file is None else file.data, round, source, metrics)
        push_file(place, path, data, "Metrics")

    def read_metrics(self, clients: Sequence[str] = ()) -> dict[int, dict[str, dict[str, Any]]]:
        """All posted metrics; what a client posted is named after it as well."""
        found: dict[int, dict[str, dict[str, Any]]] = {}
        for client in clients:
            place = self._place(client)
            if place is None or place.repo.state(place.metrics_path(client), revision=place.revision) is None:
                continue
            file = place.repo.read(place.metrics_path(client), revision=place.revision, max_bytes=MAX_METRICS_BYTES)
            for round, sources in parse_metrics(None if file is None else file.data).items():
                for source, values in sources.items():
                    found.setdefault(round, {})[f"{source}@{client}"] = values
        file = self._repo.read(paths.METRICS_PATH, revision=self._commit or "main")
        for round, sources in parse_metrics(None if file is None else file.data).items():
            found.setdefault(round, {}).update(sources)
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

    def housekeep(self, round: int, *, clients: int, keep_rounds: int, tag: bool, finished: bool = False) -> None:
        """Tag the round; forget, and in a shared repo delete and squash away, messages that are no longer wanted."""
        self._found = {key: ref for key, ref in self._found.items() if key[0] > round - keep_rounds}
        self._messages.keep_only({ref.sha256 for ref in self._found.values()})
        with contextlib.suppress(MailboxError):
            if tag:
                tag_round(self._repo, round, self._commit)
        layout = self._layouts()
        if layout.name == "shared" and round and round % TIDY_EVERY == 0:
            with contextlib.suppress(MailboxError):
                tidy(layout.repo(self._address.mailbox_repo), round, clients, keep_rounds)
        if finished:
            with contextlib.suppress(MailboxError):
                layout.close()

    # -- inside -----------------------------------------------------------------------------------------------------

    def _found_repos(self) -> None:
        self._repo.create(private=self._private)
        LAYOUTS[self._new_layout](self._address, self._api, self._patience, private=self._private).found()

    def _layouts(self) -> Layout:
        if self._layout is None:
            if self._commit is None:
                self.head()
            file = self._repo.read(paths.LAYOUT_PATH, revision=self._commit or "main", max_bytes=MAX_BYTES)
            try:
                fields = json.loads(file.data if file is not None else b"")
                layout = LAYOUTS[fields["layout"]] if fields["format"] == _FORMAT else None
            except (ValueError, KeyError, TypeError):
                layout = None
            if layout is None:
                raise MailboxError(
                    f"{self.address} does not say how its clients' messages are laid out ({paths.LAYOUT_PATH} is "
                    "missing, damaged or of a newer version). Restore it from the repo's history, or update fedfstq_hf."
                )
            self._layout = layout(self._address, self._api, self._patience, private=self._private)
        return self._layout

    def _enrolments(self) -> Control:
        return Control.from_json(self.read_control())

    def _place(self, client_id: str) -> Place | None:
        return self._layouts().place(client_id, self._enrolments().enrolment(client_id))

    def _look_for(self, round: int, client: str) -> None:
        try:
            place = self._place(client)
            if place is None:
                return
            state = place.repo.state(place.update_path(round, client), revision=place.revision)
        except MailboxUnavailableError:
            raise
        except MailboxError as error:  # one client's closed repo must not stop the others
            if client not in self._warned:
                logger.warning("Cannot look for the updates of client %s: %s", client, error)
                self._warned.add(client)
            return
        if state is not None:
            sha256 = state.etag if len(state.etag) == 64 else ""
            self._found[round, client] = UpdateRef(client, round, state.size, sha256, state.commit)
