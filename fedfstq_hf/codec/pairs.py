"""Two payloads of one codec in one message, for methods that send a second vector beside the update (SCAFFOLD).

| bytes | content |
|---|---|
| 4 | length of the first payload, uint32 little-endian |
| rest | the first payload, then the second |

The message's parameters say `{"payloads": 2}`.
"""

from __future__ import annotations

from ..errors import MessageError
from .registry import JSONScalar

PAIR_OVERHEAD = 4
PAIR_PARAMS: dict[str, JSONScalar] = {"payloads": 2}


def join_pair(first: bytes, second: bytes) -> bytes:
    """One payload of two."""
    return len(first).to_bytes(PAIR_OVERHEAD, "little") + first + second


def split_pair(payload: bytes) -> tuple[bytes, bytes]:
    """Inverse of `join_pair`. Raises MessageError if the first payload does not end within."""
    end = PAIR_OVERHEAD + int.from_bytes(payload[:PAIR_OVERHEAD], "little")
    if len(payload) < PAIR_OVERHEAD or end > len(payload):
        raise MessageError(f"payload of {len(payload)} bytes says that its first part ends at byte {end}")
    return payload[PAIR_OVERHEAD:end], payload[end:]
