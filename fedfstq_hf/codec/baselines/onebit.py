"""One bit per coordinate and one magnitude per tensor: the payload of `signsgd` and `fedbat`.

| bytes | content |
|---|---|
| 4 * tensors | magnitude of each tensor, float32 little-endian, in coordinate order |
| ceil(n / 8) | one bit per coordinate, lowest first: 1 = negative |
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from ...errors import MessageError
from ..registry import Encoded
from ..schema import Schema
from ..update import SparseUpdate
from .bits import check_fits, packed_bytes, read_floats

Float32 = npt.NDArray[np.float32]


def mean_magnitudes(schema: Schema, values: Float32) -> Float32:
    """Mean absolute value of each tensor, (tensors,); 0 for one without entries."""
    means = [
        np.abs(values[t.offset : t.offset + t.size]).mean(dtype=np.float64) if t.size else 0 for t in schema.tensors
    ]
    return np.array(means, dtype=np.float32)


def check_size(codec: str, schema: Schema, max_bytes: int | None) -> None:
    """Raise BudgetError if one bit per coordinate does not fit."""
    check_fits(codec, _size(schema), max_bytes, 'its size cannot be chosen: raise the budget, or use codec "fstq"')


def write(schema: Schema, magnitude: Float32, negative: npt.NDArray[np.bool_]) -> Encoded:
    """Payload and reconstruction. magnitude: (tensors,), negative: (num_params,)."""
    payload = magnitude.astype("<f4").tobytes() + np.packbits(negative, bitorder="little").tobytes()
    return Encoded(payload, _update(schema, magnitude, negative))


def read(codec: str, payload: bytes, schema: Schema) -> SparseUpdate:
    """Dense update of plus or minus each tensor's magnitude. Raises MessageError on any malformed payload."""
    if len(payload) != _size(schema):
        raise MessageError(f"{codec} payload has {len(payload)} bytes; expected {_size(schema)} for this adapter")
    head = 4 * len(schema.tensors)
    magnitude = read_floats(payload[:head], len(schema.tensors), "magnitude")
    raw = np.frombuffer(payload[head:], dtype=np.uint8)
    if schema.num_params % 8 and raw[-1] >> (schema.num_params % 8):
        raise MessageError(f"{codec} payload has bits set behind its last coordinate; expected zeros")
    bits = np.unpackbits(raw, count=schema.num_params, bitorder="little")
    return _update(schema, magnitude, bits.view(np.bool_))


def _size(schema: Schema) -> int:
    return 4 * len(schema.tensors) + packed_bytes(schema.num_params, 1)


def _update(schema: Schema, magnitude: Float32, negative: npt.NDArray[np.bool_]) -> SparseUpdate:
    values = np.repeat(magnitude, [t.size for t in schema.tensors])
    np.negative(values, out=values, where=negative)
    return SparseUpdate(schema.num_params, None, torch.from_numpy(values))
