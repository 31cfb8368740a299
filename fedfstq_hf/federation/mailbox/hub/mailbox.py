"""The Hub mailbox: a federation that no one has to host.

```
ORG/RUN               adapter_model.safetensors adapter_config.json README.md        what plain PEFT and people read
                      fedfstq/  mailbox.json spec.json control.json round.json history.jsonl metrics.json
                                server_optimizer.safetensors rounds/000012/{round.json,frame.safetensors}
ORG/RUN-CLIENT        rounds/000012.safetensors metrics.json                         layout own: one repo per client,
                      refinements/000012.safetensors                                 always private
ORG/RUN-mailbox       rounds/000012/deltas/CLIENT.safetensors metrics/CLIENT.json    layout shared; and the repo that
                      rounds/000012/refinements/CLIENT.safetensors                   pull requests are made to
```

One commit per round, on top of the one it was made from: two coordinators cannot both publish a round. The adapter and
the server optimizer's state of earlier rounds lie in the tags and commits of those rounds.

`GlobalRepo` reads and writes the first repo, `ClientPosts` reads the others, and `ClientWriter` writes there for a
client. Each of the others has a marker, `.fedfstq.json`, which says whose it is.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import HfApi

from fedfstq_hf.errors import MailboxError
from fedfstq_hf.federation.mailbox.hub.files import layout_file, parse_address
from fedfstq_hf.federation.mailbox.hub.global_repo import GlobalRepo
from fedfstq_hf.federation.mailbox.hub.http import DEFAULT_PATIENCE, Patience
from fedfstq_hf.federation.mailbox.hub.layouts import LAYOUTS, Layout
from fedfstq_hf.federation.mailbox.hub.posts import ClientPosts
from fedfstq_hf.federation.mailbox.hub.repo import HubRepo
from fedfstq_hf.federation.mailbox.hub.writing import ClientWriter
from fedfstq_hf.federation.mailbox.protocol import RootFiles, UpdateRef, checked_repo
from fedfstq_hf.federation.storage import checked_name


class HubMailbox:
    """A mailbox in Hub repos; many may be open on the same federation, and any may be killed at any moment.

    Args:
        address: `hf://org/repo`, the global repo.
        create: the federation may be missing: it is going to be founded here.
        layout: of a new federation.
        private: whether new repos are private.
        token: where it is not in `HF_TOKEN` or stored by `hf auth login`.
        client_repo: `org/name` that a client writes its messages to, where it is not `ORG/RUN-CLIENT`.
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
        client_repo: str | None = None,
        patience: float = DEFAULT_PATIENCE,
    ) -> None:
        self.address = address
        self._private = private
        place, self._waiting = parse_address(address), Patience(patience)
        waiting = self._waiting
        api = HfApi(token=token, library_name="fedfstq_hf")
        self._global = GlobalRepo(HubRepo(place.repo_id, api, waiting), address, waiting, create=create)
        named = None if client_repo is None else checked_repo(client_repo)

        self._new_layout = LAYOUTS[layout or "own"](place, api, waiting)

        @functools.cache
        def present_layout() -> Layout:
            return LAYOUTS[self._global.layout()](place, api, waiting)

        self._posts = ClientPosts(self._global, present_layout, place)
        self._writer = ClientWriter(self._global, present_layout, place, named)

    def set_patience(self, seconds: float) -> None:
        """How long requests are repeated from now on, in all of the federation's repos."""
        self._waiting.seconds = seconds

    # -- the coordinator's side -------------------------------------------------------------------------------------

    def head(self) -> int | None:
        """The newest published round; one HEAD request while nothing is new. It never goes back."""
        return self._global.head()

    def read(self, round: int, name: str, *, max_bytes: int | None = None) -> bytes:
        """A file of a published round, at the commit that was seen to hold it."""
        return self._global.read(round, name, max_bytes)

    def read_root(self, name: str) -> bytes | None:
        """A file for people as it is now, None where there is none."""
        return self._global.read_root(name)

    def publish(self, round: int, files: Mapping[str, bytes], root: RootFiles | None = None) -> None:
        """Publish a round in one commit on top of the previous one; before round 0, make the repos.

        What people changed in between (the card, say) is left as it is: the commit is then made again on top of it.
        """
        if round == 0:
            self._global.repo.create(private=self._private)
            self._new_layout.found(private=self._private)
        self._global.publish(round, files, root, layout_file=layout_file(self._new_layout.name) if round == 0 else None)

    def refresh_root(self, root: RootFiles | None = None) -> None:
        """Renew the files for people, where they are not what they should be."""
        self._global.refresh_root(root)

    def read_control(self) -> bytes | None:
        """The control file as of the last look at the head."""
        return self._global.read_control()

    def write_control(self, data: bytes, *, expected: bytes | None) -> bool:
        """Replace the control file if it still is `expected`."""
        return self._global.write_control(data, expected=expected)

    def housekeep(self, round: int, *, clients: int, keep_rounds: int, tag: bool, finished: bool = False) -> None:
        """Tag the round; forget, and in a shared repo delete and squash away, messages that are no longer wanted."""
        self._posts.forget(round - keep_rounds)
        with contextlib.suppress(MailboxError):
            if tag:
                self._global.tag(round)
        self._posts.tidy(round, clients, keep_rounds, finished=finished)

    # -- the clients' side ------------------------------------------------------------------------------------------

    def check_client(self, client_id: str) -> None:
        """Refuse a client that writes elsewhere than where its messages are read, or where others could read them."""
        self._writer.check(client_id)

    def post_update(
        self, round: int, client_id: str, message: bytes, *, patience: float | None = None, refinement: bool = False
    ) -> None:
        """Post a client's message where its layout says."""
        self._writer.post_update(round, client_id, message, patience=patience, refinement=refinement)

    def list_updates(
        self, round: int, clients: Sequence[str] | None = None, *, refinements: bool = False
    ) -> list[UpdateRef]:
        """The round's messages: one request for each client that none was found of yet, or one for all."""
        return self._posts.list_updates(round, clients, refinements=refinements)

    def read_update(self, ref: UpdateRef, *, max_bytes: int) -> bytes:
        """One message; kept on disk, since a round reads it twice."""
        return self._posts.read_update(ref, max_bytes=max_bytes)

    def post_attachment(self, client_id: str, name: str, data: bytes) -> None:
        """Post to the client's place."""
        self._writer.post_attachment(client_id, name, data)

    def read_attachment(self, client_id: str, name: str, *, max_bytes: int) -> bytes | None:
        """What lies at the client's place."""
        return self._posts.read_attachment(client_id, name, max_bytes=max_bytes)

    def attachment_bytes(self, client_id: str, name: str) -> int:
        """Of what lies at the client's place."""
        return self._posts.attachment_bytes(client_id, name)

    # -- metrics of both sides --------------------------------------------------------------------------------------

    def post_metric(self, round: int, source: str, metrics: Mapping[str, Any], *, client_id: str | None = None) -> None:
        """Post to the global repo, or to the place of `client_id` where that is given."""
        checked_name(source)
        if client_id is None:
            self._global.post_metric(round, source, metrics)
        else:
            self._writer.post_metric(round, source, metrics, client_id)

    def read_metrics(self, clients: Sequence[str] = ()) -> dict[int, dict[str, dict[str, Any]]]:
        """All posted metrics; what a client posted is named after it as well."""
        found = self._posts.read_metrics(clients)
        for round, sources in self._global.read_metrics().items():
            found.setdefault(round, {}).update(sources)
        return found
