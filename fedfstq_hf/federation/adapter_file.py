"""`adapter_model.safetensors` as bytes: the same tensors always give the same file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from safetensors import SafetensorError
from safetensors.torch import load as _load
from safetensors.torch import save as _save
from torch import Tensor

from fedfstq_hf.errors import MailboxError


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
