"""Everything one loopback Hub holds, and the questions every route asks of it."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass, field
from urllib.parse import quote

from tests.loopback_hub.accounts import Accounts, Token
from tests.loopback_hub.errors import HubError, repository_not_found
from tests.loopback_hub.faults import Faults
from tests.loopback_hub.log import RequestLog
from tests.loopback_hub.objects import Commit
from tests.loopback_hub.repository import Repository
from tests.loopback_hub.store import Store
from tests.loopback_hub.wire import Request


@dataclass
class Settings:
    """Sizes of pages and parts, adjustable so that small tests reach them."""

    tree_page: int = 1000  # items, folders counted
    list_page: int = 1000
    commits_page: int = 50
    discussions_page: int = 50
    lfs_above: int = 10_000_000  # bytes: larger files go to LFS whatever they hold
    multipart_above: int = 64_000_000  # bytes
    part_size: int = 16_000_000  # bytes


@dataclass
class HubState:
    accounts: Accounts = field(default_factory=Accounts)
    store: Store = field(default_factory=Store)
    faults: Faults = field(default_factory=Faults)
    log: RequestLog = field(default_factory=RequestLog)
    settings: Settings = field(default_factory=Settings)
    admin_token: str = field(default_factory=lambda: secrets.token_hex(16))
    parts: dict[tuple[str, int], bytes] = field(default_factory=dict)  # of uploads under way, by (sha256, number)
    storage_endpoint: str = ""  # of the object storage, known once it listens
    _key: bytes = field(default_factory=lambda: secrets.token_bytes(16))

    def token(self, request: Request) -> Token:
        """The caller's token; 401 for a caller without one."""
        if request.token is None:
            raise HubError(401, "Invalid username or password.")
        return request.token

    def readable(self, request: Request, type: str, id: str) -> Repository:
        """The repository, if the caller may know that it exists."""
        repository = self.store.get(id, type)
        if not self.accounts.may_read(request.token, repository):
            raise repository_not_found()
        return repository

    def downloadable(self, request: Request, type: str, id: str) -> Repository:
        """The repository, if the caller may read its files: past the gate too."""
        repository = self.readable(request, type, id)
        if not self.accounts.may_download(request.token, repository):
            message = f"Access to {type} {id} is restricted and you are not in the authorized list."
            raise HubError(403 if request.token else 401, message, "GatedRepo")
        return repository

    def writable(self, request: Request, type: str, id: str) -> Repository:
        """The repository, if the caller may write to it."""
        repository = self.readable(request, type, id)
        token = self.token(request)
        if not self.accounts.may_write(token, repository):
            raise HubError(403, self.forbidden(token, id))
        return repository

    @staticmethod
    def forbidden(token: Token, id: str) -> str:
        if token.role == "read":
            return "Forbidden: you must use a write token to upload to a repository."
        return f"Forbidden: you don't have the required permissions to write to {id}."

    def read_commit(self, request: Request, repository: Repository, revision: str) -> Commit:
        """The commit that a read sees, which may be a stale one."""
        return repository.commit_at(revision, self.faults.stale_seconds, request.back)

    def signed(self, request: Request, path: str) -> str:
        """A link into the object storage that needs no token, as the Hub's are."""
        by = quote(request.user or "", safe="")
        return f"{self.storage_endpoint}{path}?by={by}&signature={self._signature(path)}"

    def check_signature(self, request: Request) -> None:
        """403 unless the link is one of ours; 400 for one that comes with a token, as object storages answer."""
        if request.headers.get("Authorization"):
            raise HubError(400, "Only one auth mechanism allowed; only the signature query parameter should be given")
        if not hmac.compare_digest(request.first("signature") or "", self._signature(request.path)):
            raise HubError(403, "SignatureDoesNotMatch")

    def _signature(self, path: str) -> str:
        return hmac.new(self._key, path.encode(), hashlib.sha256).hexdigest()
