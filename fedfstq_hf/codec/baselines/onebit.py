"""Codecs `signsgd` and `fedbat`: one bit per coordinate and one magnitude per tensor.

`signsgd` sends the sign of every coordinate, times the tensor's mean magnitude. Signs as in signSGD (Bernstein et al.,
arXiv 1802.04434), whose message leaves the magnitude to the server's step size; the scale ||x||_1 / d per tensor is
that of EF-signSGD (Karimireddy et al., arXiv 1901.09847, algorithm 1), made for error feedback. A zero is sent as
positive.

`fedbat` is FedBAT's binarisation (Li et al., ICML 2024, arXiv 2408.03215, section 3): x becomes +alpha with probability
clip((x / alpha + 1) / 2, 0, 1), else -alpha; unbiased within +-alpha. The paper learns alpha during training, from the
start mean |x|, which is the alpha taken here; an update that training has already binarised to +-alpha goes through
unchanged.

| bytes | content |
|---|---|
| 4 * tensors | magnitude of each tensor, float32 little-endian, in coordinate order |
| ceil(n / 8) | one bit per coordinate, lowest first: 1 = negative |
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...errors import ConfigError, MessageError
from ..codec import CodecContext, Encoded, SparseUpdate, read_delta, register
from ..coding.bits import check_fits, draws, packed_bytes, read_floats
from ..schema import Schema

Float32 = npt.NDArray[np.float32]


@register("signsgd")
class SignsgdCodec:
    """Scaled signs: one bit per coordinate and one float32 per tensor."""

    name = "signsgd"
    unbiased = False

    def encode(
        self,
        delta: Mapping[str, Tensor],
        fisher: Mapping[str, Tensor] | None = None,
        *,
        max_bytes: int | None = None,
        context: CodecContext | None = None,
    ) -> Encoded:
        """Code all of `delta`; `fisher` is not used. Raises BudgetError if that exceeds `max_bytes`."""
        schema, vector = read_delta(delta)
        _check_size(self.name, schema, max_bytes)
        values = vector.numpy()
        return _write(schema, _mean_magnitudes(schema, values), values < 0)

    def decode(self, payload: bytes, schema: Schema, context: CodecContext | None = None) -> SparseUpdate:
        """Dense update. Raises MessageError on any malformed payload."""
        return _read(self.name, payload, schema)


@register("fedbat")
class FedbatCodec:
    """Stochastic signs. seed: of the binarisation, together with the round and the update itself."""

    name = "fedbat"
    unbiased = True

    def __init__(self, seed: int = 0) -> None:
        if type(seed) is not int:
            raise ConfigError(f"fedbat seed is {seed!r}; expected an integer")
        self.seed = seed

    def encode(
        self,
        delta: Mapping[str, Tensor],
        fisher: Mapping[str, Tensor] | None = None,
        *,
        max_bytes: int | None = None,
        context: CodecContext | None = None,
    ) -> Encoded:
        """Code all of `delta`; `fisher` is not used. Raises BudgetError if that exceeds `max_bytes`."""
        schema, vector = read_delta(delta)
        _check_size(self.name, schema, max_bytes)
        alpha = _mean_magnitudes(schema, vector.numpy())
        scale = np.repeat(alpha.astype(np.float64), [t.size for t in schema.tensors])
        ratio = np.divide(vector.numpy(), scale, out=np.zeros(schema.num_params), where=scale > 0)
        positive = draws(vector, self.seed, context.round if context else 0) < (ratio + 1) / 2
        return _write(schema, alpha, ~positive)

    def decode(self, payload: bytes, schema: Schema, context: CodecContext | None = None) -> SparseUpdate:
        """Dense update. Raises MessageError on any malformed payload."""
        return _read(self.name, payload, schema)


def _mean_magnitudes(schema: Schema, values: Float32) -> Float32:
    """Mean absolute value of each tensor, (tensors,); 0 for one without entries."""
    means = [
        np.abs(values[t.offset : t.offset + t.size]).mean(dtype=np.float64) if t.size else 0 for t in schema.tensors
    ]
    return np.array(means, dtype=np.float32)


def _check_size(codec: str, schema: Schema, max_bytes: int | None) -> None:
    """Raise BudgetError if one bit per coordinate does not fit."""
    check_fits(codec, _size(schema), max_bytes, 'its size cannot be chosen: raise the budget, or use codec "fstq"')


def _write(schema: Schema, magnitude: Float32, negative: npt.NDArray[np.bool_]) -> Encoded:
    """Payload and reconstruction. magnitude: (tensors,), negative: (num_params,)."""
    payload = magnitude.astype("<f4").tobytes() + np.packbits(negative, bitorder="little").tobytes()
    return Encoded(payload, _update(schema, magnitude, negative))


def _read(codec: str, payload: bytes, schema: Schema) -> SparseUpdate:
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
