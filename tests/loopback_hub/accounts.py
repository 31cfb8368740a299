"""Users, organisations and tokens of the loopback Hub, and what each token may do."""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass, field

from tests.loopback_hub.errors import HubError
from tests.loopback_hub.repository import Repository

MEMBER_ROLES = ("read", "contributor", "write", "admin")
TOKEN_ROLES = ("read", "write", "fineGrained")


@dataclass(frozen=True)
class Token:
    """An access token. A fine-grained one reaches `repos` (read and write) and, in the namespace `creates_in`, may read
    what its user may read, create repositories and write those its user created."""

    secret: str
    user: str
    role: str
    repos: frozenset[str] = frozenset()
    creates_in: str | None = None


@dataclass
class Organization:
    name: str
    members: dict[str, str] = field(default_factory=dict)  # user -> one of MEMBER_ROLES


class Accounts:
    """Who there is. Ask `may_...` with a token, or None for a caller without one."""

    def __init__(self) -> None:
        self.users: set[str] = set()
        self.organizations: dict[str, Organization] = {}
        self._tokens: dict[str, Token] = {}
        self._lock = threading.Lock()

    def add_organization(self, name: str) -> Organization:
        return self.organizations.setdefault(name, Organization(name))

    def add_user(self, name: str, organization: str | None = None, member: str = "write") -> None:
        """Create the user, or add an existing one to an organisation with that member role."""
        if member not in MEMBER_ROLES:
            raise ValueError(f"member role {member!r}: expected one of {', '.join(MEMBER_ROLES)}")
        self.users.add(name)
        if organization is not None:
            self.add_organization(organization).members[name] = member

    def add_token(
        self, user: str, role: str, repos: frozenset[str] = frozenset(), creates_in: str | None = None
    ) -> Token:
        if role not in TOKEN_ROLES:
            raise ValueError(f"token role {role!r}: expected one of {', '.join(TOKEN_ROLES)}")
        with self._lock:
            digest = hashlib.sha256(f"{user}|{role}|{len(self._tokens)}".encode()).hexdigest()
            token = Token(f"hf_{digest[:34]}", user, role, repos, creates_in)
            self._tokens[token.secret] = token
        return token

    def revoke(self, secret: str) -> None:
        self._tokens.pop(secret, None)

    def identify(self, authorization: str | None) -> Token | None:
        """The caller's token; None without an Authorization header; 401 for a token that does not exist."""
        if not authorization:
            return None
        token = self._tokens.get(authorization.removeprefix("Bearer ").strip())
        if token is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        return token

    def member_role(self, user: str, namespace: str) -> str | None:
        """The user's role in a namespace: "admin" in their own, None for strangers."""
        if user == namespace:
            return "admin"
        organization = self.organizations.get(namespace)
        return organization.members.get(user) if organization else None

    def may_read(self, token: Token | None, repository: Repository) -> bool:
        """Whether the caller sees the repository (its files need `may_download` too)."""
        if not repository.private:
            return True
        if token is None or self.member_role(token.user, repository.namespace) is None:
            return False
        if token.role == "fineGrained":
            return repository.id in token.repos or repository.namespace == token.creates_in
        return True

    def may_download(self, token: Token | None, repository: Repository) -> bool:
        """Whether a gate, if there is one, is open to the caller."""
        if not repository.gated:
            return True
        if token is None:
            return False
        return token.user in repository.granted or self.member_role(token.user, repository.namespace) is not None

    def may_write(self, token: Token | None, repository: Repository) -> bool:
        if token is None or token.role == "read":
            return False
        role = self.member_role(token.user, repository.namespace)
        by_role = role in ("write", "admin") or (role == "contributor" and repository.creator == token.user)
        if token.role == "fineGrained" and repository.id not in token.repos:
            return by_role and repository.namespace == token.creates_in and repository.creator == token.user
        return by_role

    def may_create(self, token: Token | None, namespace: str) -> bool:
        if token is None or token.role == "read":
            return False
        if token.role == "fineGrained" and token.creates_in != namespace:
            return False
        return self.member_role(token.user, namespace) in ("contributor", "write", "admin")

    def may_discuss(self, token: Token | None, repository: Repository) -> bool:
        """Open discussions and pull requests: every reader whose token is not read-only."""
        if token is None or token.role == "read":
            return False
        return token.role == "write" or self.may_write(token, repository)
