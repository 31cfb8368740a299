"""Who am I, may I, and is this card valid."""

from __future__ import annotations

from typing import Any

import yaml

from tests.loopback_hub.errors import HubError
from tests.loopback_hub.state import HubState
from tests.loopback_hub.wire import REPOSITORY, Request, Response, answer_json, route


@route("GET", "/api/whoami-v2")
def whoami(hub: HubState, request: Request) -> Response:
    token = hub.token(request)
    access: dict[str, Any] = {"displayName": token.user, "role": token.role, "createdAt": "2026-01-01T00:00:00.000Z"}
    if token.role == "fineGrained":
        scopes = [({"type": "model", "name": name}, ["repo.content.read", "repo.write"]) for name in token.repos]
        if token.creates_in:
            scopes.append(({"type": "org", "name": token.creates_in}, ["repo.content.read", "repo.create"]))
        access["fineGrained"] = {
            "canReadGatedRepos": True,
            "global": [],
            "scoped": [{"entity": entity, "permissions": permissions} for entity, permissions in scopes],
        }
    return answer_json(
        {
            "type": "user",
            "id": token.user,
            "name": token.user,
            "fullname": token.user,
            "email": f"{token.user}@localhost",
            "orgs": [
                {"type": "org", "id": name, "name": name, "fullname": name, "roleInOrg": role}
                for name, organization in hub.accounts.organizations.items()
                if (role := organization.members.get(token.user))
            ],
            "auth": {"type": "access_token", "accessToken": access},
        }
    )


@route("GET", f"{REPOSITORY}/auth-check")
def auth_check(hub: HubState, request: Request, type: str, id: str) -> Response:
    hub.downloadable(request, type, id)
    return answer_json({})


@route("GET", f"{REPOSITORY}/auth-check/write")
def auth_check_write(hub: HubState, request: Request, type: str, id: str) -> Response:
    hub.writable(request, type, id)
    return answer_json({})


@route("POST", "/api/validate-yaml")
def validate_yaml(hub: HubState, request: Request) -> Response:
    metadata, errors = card_metadata(str(request.json().get("content", "")))
    strings = {"license": (str, list), "base_model": (str, list), "datasets": (str, list), "tags": (list,)}
    for name, kinds in strings.items():
        if name in metadata and not isinstance(metadata[name], kinds):
            errors.append(f'"{name}" must be {" or ".join("a string" if k is str else "an array" for k in kinds)}')
    index = metadata.get("model-index", [])
    if not isinstance(index, list) or not all(isinstance(model, dict) and "results" in model for model in index):
        errors.append('"model-index" must be an array of objects with "name" and "results"')
    if errors:
        return answer_json({"errors": [{"message": text} for text in errors], "warnings": []}, 400)
    warnings = [] if metadata else [{"message": "empty or missing yaml metadata in repo card"}]
    return answer_json({"errors": [], "warnings": warnings})


def card_metadata(text: str) -> tuple[dict[str, Any], list[str]]:
    """The YAML block at the head of a card, and what is wrong with it."""
    lines = text.splitlines()
    if not lines or lines[0].strip() != "---" or "---" not in [line.strip() for line in lines[1:]]:
        return {}, []
    end = [line.strip() for line in lines[1:]].index("---") + 1
    try:
        metadata = yaml.safe_load("\n".join(lines[1:end]))
    except yaml.YAMLError as error:
        return {}, [f"Invalid YAML: {error}"]
    if metadata is None:
        return {}, []
    if not isinstance(metadata, dict):
        return {}, ["Metadata must be a mapping"]
    return metadata, []


@route("GET", r"/api/organizations/(?P<name>[^/]+)/members")
def organization_members(hub: HubState, request: Request, name: str) -> Response:
    organization = hub.accounts.organizations.get(name)
    if organization is None:
        raise HubError(404, "Organization not found")
    return answer_json([{"user": user, "type": "user", "fullname": user} for user in sorted(organization.members)])
