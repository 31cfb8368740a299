"""The message container: one safetensors file with one uint8 tensor and one metadata key, all of it digested.

Byte by byte (H = length of the JSON text, N = payload bytes, no padding anywhere):

| bytes | content |
|---|---|
| 8 | H, little-endian uint64 |
| H | `{"__metadata__":{"fstq":"M"},"payload":{"dtype":"U8","shape":[N],"data_offsets":[0,N]}}` |
| N | the codec's payload |

`M` is canonical JSON (ASCII, no spaces, keys sorted), escaped as a JSON string, at most 512 bytes before escaping:
`[version,round,num_examples,"client_id","codec",{params},"hashes"]`. `hashes` is base85 (RFC 1924 alphabet) of 96
bytes, or 160 if signed: digest of the base adapter, schema fingerprint, digest, Ed25519 signature. The digest is
sha256 over `fedfstq message`, a newline, the canonical JSON of the list without `hashes`, the first two hashes, and the
payload. There is exactly one byte string per header, payload and signature: anything else is refused.

A method that sends a second vector beside the update (SCAFFOLD) has parameters `{"payloads": 2}`, and as payload the
length of the first (uint32, little-endian), the first, then the second.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from ..errors import MessageError
from .codec import JSONScalar
from .schema import Schema

VERSION = 1
MAX_METADATA = 512
SIGNATURE_BYTES = 64
REFINEMENT_PARAMS: dict[str, JSONScalar] = {"refinement": True}
"""Parameters of a client's second message of a round, its whole update said better than the first could."""
# begins a message that is sealed to its reader (federation/keys.py); as a safetensors length it would be absurd
SEALED_PREFIX = b"fedfstq sealed\n"
ATTACHMENT = "attachment"
"""Named as the codec of what is no update: a file that a client sends beside its updates, as it is."""
MAX_CONTAINER = 8 + 2 * MAX_METADATA + 256
"""No container has more bytes around its payload: escaping at most doubles the metadata, and the frame is short."""
PAIR_OVERHEAD = 4  # bytes that a second payload costs beside itself
PAIR_PARAMS: dict[str, JSONScalar] = {"payloads": 2}
_MAX_INT = 2**53 - 1
_HEX = re.compile(r"[0-9a-f]{64}")
_CLIENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_CODEC = re.compile(r"[a-z0-9][a-z0-9._-]{0,31}")
_NO_DIGEST = bytes(32)
_NO_SIGNATURE = bytes(SIGNATURE_BYTES)


@dataclass(frozen=True)
class Header:
    """Who sent what, relative to what. base: hex digest of the adapter it starts from; schema: `Schema.fingerprint`.

    Raises MessageError if a field is out of range (client ids: letters, digits, `.`, `_`, `-`, at most 64).
    """

    round: int
    client_id: str
    num_examples: int
    base: str
    schema: str
    codec: str
    params: dict[str, JSONScalar] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("round", "num_examples"):
            value = getattr(self, name)
            if type(value) is not int or not 0 <= value <= _MAX_INT:
                raise MessageError(f"message {name} is {value!r}; expected an integer from 0 to 2**53 - 1")
        for name, pattern in (("client_id", _CLIENT), ("base", _HEX), ("schema", _HEX), ("codec", _CODEC)):
            value = getattr(self, name)
            if not isinstance(value, str) or not pattern.fullmatch(value):
                raise MessageError(f"message {name} is {value!r:.100}; expected text matching {pattern.pattern}")
        for key, value in _items(self.params):
            if not isinstance(key, str) or not isinstance(value, (str, int, float, bool, type(None))):
                raise MessageError(f"codec parameter {key!r:.60} is {value!r:.60}; expected text, number, bool or null")
            if isinstance(value, (int, float)) and not -_MAX_INT <= value <= _MAX_INT:
                raise MessageError(
                    f"codec parameter {key!r:.60} is {value!r:.60}; expected a number within +-(2**53 - 1)"
                )


class Unpacked(NamedTuple):
    """A message taken apart. `signature` is unchecked: who may sign, and for which federation, is not known here."""

    header: Header
    payload: bytes
    digest: bytes
    signature: bytes | None


def is_sealed(data: bytes) -> bool:
    """Whether `data` is a sealed message; a plain one never begins like that."""
    return data.startswith(SEALED_PREFIX)


def pack(header: Header, payload: bytes, sign: Callable[[bytes], bytes] | None = None) -> bytes:
    """The message: same header and payload, same bytes. Raises MessageError if the metadata exceeds 512 bytes.

    sign: makes a 64-byte signature of the 32-byte digest (`federation.keys.signer`); None leaves the message unsigned.
    """
    digest = _digest(header, payload)
    signature = b"" if sign is None else sign(digest)
    if sign is not None and len(signature) != SIGNATURE_BYTES:
        raise MessageError(f"the signature has {len(signature)} bytes; expected the {SIGNATURE_BYTES} of Ed25519")
    return _envelope(header, digest + signature, len(payload)) + payload


def attachment_header(name: str, *, client_id: str, round: int, base: str, schema: str) -> Header:
    """Header of a client's attachment `name` to its message of a round; arguments as in `Header`."""
    return Header(round, client_id, 0, base, schema, ATTACHMENT, {"name": name})


def overhead(header: Header, max_payload: int, signed: bool = False) -> int:
    """Container bytes around a payload of at most `max_payload` bytes: exact for that size, an upper bound below it."""
    return len(_envelope(header, _NO_DIGEST + (_NO_SIGNATURE if signed else b""), max_payload))


def unpack(data: bytes, *, max_bytes: int | None = None) -> tuple[Header, bytes]:
    """Header and payload of a message. Raises MessageError unless every byte is as `pack` would have written it."""
    header, payload, _, _ = unpack_signed(data, max_bytes=max_bytes)
    return header, payload


def unpack_signed(data: bytes, *, max_bytes: int | None = None) -> Unpacked:
    """Like `unpack`, with the digest and what claims to be its signature (None: unsigned). Raises MessageError."""
    if max_bytes is not None and len(data) > max_bytes:
        raise MessageError(f"message has {len(data)} bytes; at most {max_bytes} were allowed")
    if is_sealed(data):
        raise MessageError("message is sealed; only the holder of the private key that it was sealed to can read it")
    if len(data) < 8:
        raise MessageError(f"message has {len(data)} bytes; expected at least the 8 bytes of a safetensors length")
    length = int.from_bytes(data[:8], "little")
    if length > min(len(data), MAX_CONTAINER) - 8:
        raise MessageError(f"message announces a header of {length} bytes; more than it holds or the format allows")
    payload = data[8 + length :]
    header, seal = _parse(data[8 : 8 + length])
    if _envelope(header, seal, len(payload)) != data[: 8 + length]:
        raise MessageError("message header is not in canonical form, or its sizes disagree with the payload")
    digest, signature = seal[:32], seal[32:] or None
    if _digest(header, payload) != digest:
        raise MessageError("message digest does not match header and payload; the file is damaged or was altered")
    return Unpacked(header, payload, digest, signature)


def _parse(text: bytes) -> tuple[Header, bytes]:
    """Header, digest + signature out of the safetensors JSON; the caller checks the form by writing it again."""
    try:
        meta = json.loads(text)["__metadata__"]["fstq"]
        if len(meta) > MAX_METADATA:
            raise MessageError(f"message metadata has {len(meta)} characters; at most {MAX_METADATA} are allowed")
        fields = json.loads(meta)
        version = fields[0]
        if type(version) is not int or version != VERSION:
            raise MessageError(
                f"message has format version {version!r:.20}, this package reads version {VERSION}; if it is newer, "
                "type: pip install --upgrade fedfstq_hf"
            )
        _, round_, num_examples, client_id, codec, params, hashes = fields
        raw = base64.b85decode(hashes)
    except MessageError:
        raise
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise MessageError(f"message metadata cannot be read ({type(error).__name__}); expected key fstq") from error
    if len(raw) not in (96, 96 + SIGNATURE_BYTES):
        raise MessageError(f"message carries {len(raw)} bytes of hashes; expected 96, or 160 with a signature")
    base, schema = raw[:32].hex(), raw[32:64].hex()
    return Header(round_, client_id, num_examples, base, schema, codec, params), raw[64:]


def _fields(header: Header) -> list[Any]:
    return [VERSION, header.round, header.num_examples, header.client_id, header.codec, header.params]


def _digest(header: Header, payload: bytes) -> bytes:
    hashes = bytes.fromhex(header.base + header.schema)
    return hashlib.sha256(b"fedfstq message\n" + _canonical(_fields(header)) + hashes + payload).digest()


def _envelope(header: Header, seal: bytes, size: int) -> bytes:
    hashes = base64.b85encode(bytes.fromhex(header.base + header.schema) + seal).decode()
    meta = _canonical([*_fields(header), hashes])
    if len(meta) > MAX_METADATA:
        raise MessageError(
            f"message metadata has {len(meta)} bytes, {MAX_METADATA} are allowed; shorten client_id or codec params"
        )
    tensor = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
    text = json.dumps({"__metadata__": {"fstq": meta.decode()}, "payload": tensor}, separators=(",", ":")).encode()
    return len(text).to_bytes(8, "little") + text


def _canonical(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), sort_keys=True, allow_nan=False).encode()


def _items(params: Any) -> list[tuple[Any, Any]]:
    if not isinstance(params, dict):
        raise MessageError(f"codec params are {params!r:.60}; expected an object of scalars")
    return list(params.items())


@dataclass(frozen=True)
class MatrixInfo:
    """One tensor of a decoded message: coordinates sent, of how many, and their root mean square."""

    name: str
    size: int
    sent: int
    rms: float


@dataclass(frozen=True)
class MessageInfo:
    """What is in a message. `matrices` and `num_params` are filled if the adapter's schema was given."""

    header: Header
    total_bytes: int
    payload_bytes: int
    sha256: str
    signed: bool = False
    num_params: int | None = None
    matrices: tuple[MatrixInfo, ...] = ()

    def __str__(self) -> str:
        h = self.header
        container = self.total_bytes - self.payload_bytes
        lines = [
            f"round {h.round} from {h.client_id} ({h.num_examples} examples), codec {h.codec}",
            f"{self.total_bytes} bytes = {self.payload_bytes} payload + {container} container",
            f"sha256 {self.sha256}, base {h.base[:12]}, schema {h.schema[:12]}, {'' if self.signed else 'not '}signed",
        ]
        if self.num_params:
            sent = sum(m.sent for m in self.matrices)
            bits = 8 * self.total_bytes / self.num_params
            lines.append(
                f"{sent} of {self.num_params} coordinates ({100 * sent / self.num_params:.2f} %), "
                f"{bits:.3f} bits per parameter, {32 / bits:.1f}x below fp32"
            )
            width = max(len(m.name) for m in self.matrices)
            for m in self.matrices:
                share = 100 * m.sent / max(m.size, 1)
                lines.append(f"  {m.name:<{width}} {m.sent:>9} of {m.size:>9}  {share:6.2f} %  rms {m.rms:.3g}")
        return "\n".join(lines)


def inspect(data: bytes, schema: Schema | None = None) -> MessageInfo:
    """Check and describe a message; with the adapter's schema also decode it, matrix by matrix. Raises MessageError."""
    header, payload, _, signature = unpack_signed(data)
    info = MessageInfo(header, len(data), len(payload), hashlib.sha256(data).hexdigest(), signature is not None)
    if schema is None:
        return info
    if schema.fingerprint != header.schema:
        raise MessageError(
            f"message is for schema {header.schema[:12]}, the adapter given has {schema.fingerprint[:12]}; "
            "give the adapter of the same base model and LoRA configuration"
        )
    from .codec import get_codec

    params = {key: value for key, value in header.params.items() if key not in REFINEMENT_PARAMS}
    if params.pop("payloads", 1) == 2:
        payload, _ = split_pair(payload)  # the update; what travels beside it is no adapter
    try:
        codec = get_codec(header.codec, **params)
    except (TypeError, ValueError) as error:  # parameters come from the message
        raise MessageError(f"message names a codec that cannot be made here: {error}") from error
    dense = codec.decode(payload, schema).to_dense()
    matrices = []
    for spec in schema.tensors:
        part = dense[spec.offset : spec.offset + spec.size]
        sent = part[part != 0]
        rms = float(sent.double().square().mean().sqrt()) if sent.numel() else 0.0
        matrices.append(MatrixInfo(spec.name, spec.size, sent.numel(), rms))
    return replace(info, num_params=schema.num_params, matrices=tuple(matrices))


def join_pair(first: bytes, second: bytes) -> bytes:
    """One payload of two."""
    return len(first).to_bytes(PAIR_OVERHEAD, "little") + first + second


def split_pair(payload: bytes) -> tuple[bytes, bytes]:
    """Inverse of `join_pair`. Raises MessageError if the first payload does not end within."""
    end = PAIR_OVERHEAD + int.from_bytes(payload[:PAIR_OVERHEAD], "little")
    if len(payload) < PAIR_OVERHEAD or end > len(payload):
        raise MessageError(f"payload of {len(payload)} bytes says that its first part ends at byte {end}")
    return payload[PAIR_OVERHEAD:end], payload[end:]
