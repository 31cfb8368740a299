"""JSON for calls from other processes: plain values, bytes, and log entries."""

from __future__ import annotations

import base64
import json
from dataclasses import asdict
from typing import Any

from tests.loopback_hub.log import Entry


def dumps(value: Any) -> bytes:
    return json.dumps(value, default=_encode).encode()


def loads(text: bytes) -> Any:
    return json.loads(text, object_hook=_decode)


def _encode(value: Any) -> dict[str, Any]:
    if isinstance(value, bytes):
        return {"_bytes": base64.b64encode(value).decode()}
    if isinstance(value, Entry):
        return {"_entry": asdict(value)}
    raise TypeError(f"cannot send {type(value).__name__} to another process")


def _decode(value: dict[str, Any]) -> Any:
    if "_bytes" in value:
        return base64.b64decode(value["_bytes"])
    return Entry(**value["_entry"]) if "_entry" in value else value
