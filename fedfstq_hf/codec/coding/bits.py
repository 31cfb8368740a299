"""Fixed-width packing and seeded draws, shared by the baselines."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ...errors import BudgetError, MessageError

Float64 = npt.NDArray[np.float64]
_INFINITY = 0x7F800000  # as bits of a float32
_BLOCK = 1 << 13  # values packed at a time, to save memory; a multiple of 8, so that blocks end on bytes


def packed_bytes(count: int, width: int) -> int:
    """Bytes of `count` values of `width` bits each."""
    return (count * width + 7) // 8


def pack_bits(values: npt.NDArray[Any], width: int) -> bytes:
    """Integers 0 .. 2^width - 1 back to back, lowest bit first, the last byte filled up with zeros."""
    shifts = np.arange(width, dtype=np.uint64)
    parts = []
    for start in range(0, values.size, _BLOCK):
        block = values[start : start + _BLOCK].astype(np.uint64)
        bits = ((block[:, None] >> shifts) & np.uint64(1)).astype(np.uint8)
        parts.append(np.packbits(bits.reshape(-1), bitorder="little").tobytes())
    return b"".join(parts)


def unpack_bits(data: bytes | memoryview, count: int, width: int, dtype: npt.DTypeLike = np.int64) -> npt.NDArray[Any]:
    """Inverse of `pack_bits`. Raises MessageError unless `data` is exactly what packing `count` values gives."""
    if len(data) != packed_bytes(count, width):
        raise MessageError(
            f"payload holds {len(data)} bytes for {count} values of {width} bits; expected {packed_bytes(count, width)}"
        )
    raw = np.frombuffer(data, dtype=np.uint8)
    if count * width % 8 and raw[-1] >> (count * width % 8):
        raise MessageError("payload has bits set behind its last value; expected zeros")
    values = np.empty(count, dtype=dtype)
    for start in range(0, count, _BLOCK):
        size = min(_BLOCK, count - start)
        packed = raw[start * width // 8 :][: packed_bytes(size, width)]
        bits = np.unpackbits(packed, count=size * width, bitorder="little").reshape(size, width)
        block = np.zeros(size, dtype=np.int64)
        for place in range(width):
            block |= bits[:, place].astype(np.int64) << place
        values[start : start + size] = block
    return values


def draws(vector: Tensor, seed: int, round: int) -> Float64:
    """One number in [0, 1) per coordinate (num_params,), the same for the same seed, round and update.

    The update takes part in the seed, so that clients draw independently without having to be told apart.
    """
    digest = hashlib.sha256(f"fedfstq draws {seed} {round}\n".encode() + vector.numpy().tobytes()).digest()
    raw = np.random.PCG64(int.from_bytes(digest, "big")).random_raw(vector.numel())
    uniform: Float64 = (np.asarray(raw, dtype=np.uint64) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return uniform


def check_fits(codec: str, size: int, max_bytes: int | None, remedy: str) -> None:
    """Raise BudgetError if a payload whose size cannot be chosen exceeds the budget."""
    if max_bytes is not None and size > max_bytes:
        raise BudgetError(f"codec {codec} takes {size} bytes of payload here, the budget leaves {max_bytes}; {remedy}")


def read_floats(data: bytes | memoryview, count: int, what: str) -> npt.NDArray[np.float32]:
    """`count` little-endian float32, all of `data`. Raises MessageError unless they are finite and not negative."""
    values = np.frombuffer(data, dtype="<f4").astype(np.float32)
    # infinity and NaN are the largest as unsigned integers, and so is everything with its sign bit set
    if values.size != count or values.view(np.uint32).max(initial=0) >= _INFINITY:
        raise MessageError(f"payload holds a {what} that is negative or not finite")
    return values
