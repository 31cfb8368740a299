"""Codec `sparse32`: lossless, for updates that are mostly zeros, such as the mean of sparse client updates.

Entropy-coded support plus exact float32 values; it carries the published global update.

| bytes | content |
|---|---|
| 1 | mode: bits 0-1 = 0 values raw, 1 zstandard, 2 zstandard of the four byte planes; bit 2 = dense; other bits 0 |
| 4 | S, little-endian uint32 (absent if dense) |
| S | support: one ANS stream, see support.py (absent if dense) |
| rest | values: float32 little-endian in coordinate order; byte planes: all first bytes, all second bytes, ... |
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import zstandard
from torch import Tensor

from ..errors import BudgetError, MessageError
from . import support
from .dense import read_delta
from .entropy import Reader, Writer
from .registry import CodecContext, Encoded, register
from .schema import Schema
from .support import Layout
from .update import SparseUpdate

_RAW, _PLAIN, _PLANES, _DENSE = 0, 1, 2, 4
_ZSTD_LEVEL = 12
_MAX_WINDOW = 1 << 27


@register("sparse32")
class Sparse32Codec:
    """Lossless: non-zero coordinates and their float32 values (-0.0 becomes 0.0)."""

    name = "sparse32"

    def encode(
        self,
        delta: Mapping[str, Tensor],
        fisher: Mapping[str, Tensor] | None = None,
        *,
        max_bytes: int | None = None,
        context: CodecContext | None = None,
    ) -> Encoded:
        """Code every non-zero coordinate; `fisher` is not used. Raises BudgetError if that exceeds `max_bytes`."""
        schema, vector = read_delta(delta)
        indices = torch.nonzero(vector).reshape(-1)
        dense = indices.numel() == schema.num_params
        values = vector if dense else vector[indices]
        raw = values.numpy().astype("<f4").tobytes()
        compressor = zstandard.ZstdCompressor(level=_ZSTD_LEVEL)
        planes = np.frombuffer(raw, dtype=np.uint8).reshape(-1, 4).T.tobytes()
        forms = {_RAW: raw, _PLAIN: compressor.compress(raw), _PLANES: compressor.compress(planes)}
        form = min(forms, key=lambda f: (len(forms[f]), f))
        payload = bytes([form | (_DENSE if dense else 0)])
        if not dense:
            layout, writer = Layout.of(schema), Writer()
            support.write(writer, layout, indices.numpy(), support.plan(layout, layout.columns_of(indices.numpy())[0]))
            stream = writer.finish()
            payload += len(stream).to_bytes(4, "little") + stream
        payload += forms[form]
        if max_bytes is not None and len(payload) > max_bytes:
            raise BudgetError(
                f"{indices.numel()} non-zero values take {len(payload)} bytes losslessly, the budget is {max_bytes}; "
                'raise it or use codec "fstq"'
            )
        return Encoded(payload, SparseUpdate(schema.num_params, None if dense else indices, values))

    def decode(self, payload: bytes, schema: Schema, context: CodecContext | None = None) -> SparseUpdate:
        """Exact update. Raises MessageError on any malformed payload or non-finite value."""
        if not payload or payload[0] & 3 == 3 or payload[0] & ~7:
            raise MessageError(f"sparse32 payload begins with byte {payload[:1].hex()!r}; expected a mode, 00 to 06")
        form, rest = payload[0] & 3, payload[1:]
        indices = None
        if not payload[0] & _DENSE:
            length = int.from_bytes(rest[:4], "little")
            if len(rest) < 4 or length > len(rest) - 4:
                raise MessageError(f"sparse32 payload of {len(payload)} bytes announces a support of {length} bytes")
            reader = Reader(rest[4 : 4 + length])
            indices = torch.from_numpy(support.read(reader, Layout.of(schema)))
            reader.finish()
            rest = rest[4 + length :]
        count = schema.num_params if indices is None else indices.numel()
        data = rest if form == _RAW else _decompress(rest, 4 * count)
        if len(data) != 4 * count:
            raise MessageError(f"sparse32 payload holds {len(data)} bytes of values; expected {4 * count}")
        if form == _PLANES:
            data = np.frombuffer(data, dtype=np.uint8).reshape(4, -1).T.tobytes()
        values = np.frombuffer(data, dtype="<f4").astype(np.float32)
        if not np.isfinite(values).all():  # torch's takes twice the memory of the values
            raise MessageError("sparse32 payload holds NaN or infinity; expected finite values")
        return SparseUpdate(schema.num_params, indices, torch.from_numpy(values))


def _decompress(data: bytes, size: int) -> bytes:
    try:
        # the announced size is checked before any allocation
        frame = zstandard.get_frame_parameters(data)
        if frame.content_size != size or frame.window_size > _MAX_WINDOW:
            raise MessageError(f"sparse32 values announce {frame.content_size} bytes; expected {size}")
        stream = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW).decompressobj()
        values = stream.decompress(data)
    except zstandard.ZstdError as error:
        raise MessageError(f"sparse32 values are not a valid zstandard frame: {error}") from error
    if not stream.eof or stream.unused_data:
        raise MessageError("sparse32 values end before or after their zstandard frame")
    return values
