"""`adapter_model.safetensors` as bytes: the same tensors always give the same file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from safetensors import SafetensorError
from safetensors.torch import load as _load
from safetensors.torch import save as _save
from torch import Tensor

from fedfstq_hf.codec import Schema
from fedfstq_hf.errors import MailboxError

_HEADER_BYTES = 500  # of one tensor besides its name, and of the file: a few dozen, in any layout of JSON


def most_bytes(schema: Schema) -> int:
    """No adapter file of the schema, nor any other file with a float32 number for each parameter, is larger."""
    header = sum(len(spec.name.encode()) + _HEADER_BYTES for spec in schema.tensors)
    return 4 * schema.num_params + header + _HEADER_BYTES


def dump(state: Mapping[str, Tensor]) -> bytes:
    """A PEFT adapter file of a state dict; plain PEFT reads it."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(state.items())}
    return _save(contiguous, metadata={"format": "pt"})


def load(data: bytes, *, expected_sha256: str | None = None) -> dict[str, Tensor]:
    """The state dict in an adapter file.

    Raises:
        MailboxError: the bytes are damaged, or their sha256 is not the expected one.
    """
    if expected_sha256 is not None and (found := hashlib.sha256(data).hexdigest()) != expected_sha256:
        raise MailboxError(
            f"The adapter's sha256 is {found}, its round record says {expected_sha256}: the file is damaged or was "
            "edited. Restore it from a backup of the mailbox."
        )
    try:
        return _load(data)
    except SafetensorError as error:
        raise MailboxError(f"The adapter file cannot be read: {error}") from error
