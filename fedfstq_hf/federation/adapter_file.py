"""`adapter_model.safetensors` as bytes: the same tensors always give the same file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from safetensors import SafetensorError
from safetensors.torch import load as _load
from safetensors.torch import save as _save
from torch import Tensor

from fedfstq_hf.codec import Schema
from fedfstq_hf.errors import AdapterMismatchError, FedFSTQError, MailboxError
from fedfstq_hf.text import printable

MAX_HEADER = 1 << 23
"""Bytes of names and shapes in a file whose tensors are not known beforehand: some ten thousands of tensors."""
_HEADER_OF_TENSOR = 256  # bytes beside its name, whose characters JSON may escape in six
_HEADER_ROOM = 4096


def most_bytes(schema: Schema) -> int:
    """No adapter file of the schema, nor any other file with a float32 number for each parameter, is larger."""
    return 4 * schema.num_params + _header_room(schema)


def dump(state: Mapping[str, Tensor]) -> bytes:
    """A PEFT adapter file of a state dict; plain PEFT reads it."""
    contiguous: dict[str, Tensor] = {}
    held: set[int] = set()
    for name, tensor in sorted(state.items()):
        tensor = tensor.detach().cpu().contiguous()
        if tensor.data_ptr() in held:  # of tied weights, each name has its own numbers in a file
            tensor = tensor.clone()
        held.add(tensor.data_ptr())
        contiguous[name] = tensor
    return _save(contiguous, metadata={"format": "pt"})


def load(data: bytes, *, expected_sha256: str | None = None, schema: Schema | None = None) -> dict[str, Tensor]:
    """The state dict in an adapter file.

    Args:
        data: the file.
        expected_sha256: by the round's record.
        schema: of the adapter that it has to be.

    Raises:
        MailboxError: the bytes are damaged, their sha256 is not the expected one, the tensors are not those of the
            schema, or they hold NaN or infinity.
    """
    if expected_sha256 is not None and (found := hashlib.sha256(data).hexdigest()) != expected_sha256:
        raise MailboxError(
            f"The adapter's sha256 is {found}, its round record says {expected_sha256}: the file is damaged or was "
            "edited. Restore it from a backup of the mailbox."
        )
    room = MAX_HEADER if schema is None else _header_room(schema)
    state = load_tensors(data, "The adapter file", max_header=room, error=MailboxError)
    try:
        held = Schema.from_state_dict(state)
    except AdapterMismatchError as error:
        raise MailboxError(f"The adapter file cannot be used: {error}") from error
    if schema is not None and held != schema:
        raise MailboxError(f"The adapter file is not one of this federation's adapter: {_difference(held, schema)}.")
    return state


def load_tensors(data: bytes, what: str, *, max_header: int, error: type[FedFSTQError]) -> dict[str, Tensor]:
    """Tensors of a safetensors file that somebody else wrote.

    Args:
        data: the file; its tensors take as many bytes as it has.
        what: names it in errors.
        max_header: bytes of names and shapes; each tensor costs memory, an empty one too.
        error: what is raised.

    Raises:
        error: it is damaged, its header is larger, or a tensor is empty or holds NaN or infinity.
    """
    check_header(data, what, max_header, error)
    try:
        state: dict[str, Tensor] = _load(data)
    except (
        SafetensorError,
        ArithmeticError,
        AssertionError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as broken:
        raise error(f"{what} cannot be read: {printable(broken)}") from broken
    for name, tensor in sorted(state.items()):
        if not tensor.numel():
            raise error(f"{what} has a tensor without numbers, {_name(name)}.")
        if tensor.dtype.is_floating_point and not bool(torch.isfinite(tensor.float()).all()):
            raise error(f"{what} holds NaN or infinity in {_name(name)}.")
    return state


def check_header(start: bytes, what: str, max_header: int, error: type[FedFSTQError]) -> None:
    """Raise `error` if a safetensors file that begins like this has more than so many bytes of names and shapes."""
    header = int.from_bytes(start[:8], "little")
    if header > max_header:
        raise error(f"{what} has {header} bytes of names and shapes; expected at most {max_header}.")


def _header_room(schema: Schema) -> int:
    return _HEADER_ROOM + sum(_HEADER_OF_TENSOR + 6 * len(spec.name) for spec in schema.tensors)


def _difference(held: Schema, expected: Schema) -> str:
    mine = {spec.name: f"{spec.dtype} {spec.shape}" for spec in held.tensors}
    wanted = {spec.name: f"{spec.dtype} {spec.shape}" for spec in expected.tensors}
    name = min(name for name in {*mine, *wanted} if mine.get(name) != wanted.get(name))
    shown = printable(mine.get(name, "missing"))
    return f"{_name(name)} is {shown}; expected {wanted.get(name, 'no such tensor')}"


def _name(name: str) -> str:
    return printable(repr(name), 120)
