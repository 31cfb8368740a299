"""Codec `sparse32`: lossless, for updates that are mostly zeros, such as the mean of sparse client updates.

Entropy-coded support plus exact float32 values; it carries the published global update.

| bytes | content |
|---|---|
| 1 | mode: bits 0-1 = 0 values raw, 1 zstandard, 2 zstandard of the four byte planes; bit 2 = dense; other bits 0 |
| 4 | S, little-endian uint32 (absent if dense) |
| S | support: one ANS stream, see index_coding.py (absent if dense) |
| rest | values: float32 little-endian in coordinate order; byte planes: all first bytes, all second bytes, ... |
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

import numpy as np
import torch
import zstandard
from torch import Tensor

from ..errors import BudgetError, MessageError
from .codec import CodecContext, Coordinates, Encoded, SparseUpdate, read_delta, register
from .coding import index_coding
from .coding.entropy import Reader, Writer
from .coding.index_coding import Layout
from .schema import Schema

_RAW, _PLAIN, _PLANES, _DENSE = 0, 1, 2, 4
_ZSTD_LEVEL = 12
_MAX_WINDOW = 1 << 27


@register("sparse32")
class Sparse32Codec:
    """Lossless: non-zero coordinates and their float32 values (-0.0 becomes 0.0)."""

    name = "sparse32"
    unbiased = False

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
            index_coding.write(
                writer, layout, indices.numpy(), index_coding.plan(layout, layout.columns_of(indices.numpy())[0])
            )
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
        form, rest, layout = payload[0] & 3, memoryview(payload)[1:], Layout.of(schema)
        if payload[0] & _DENSE:
            places = Coordinates(np.ones(schema.num_params, dtype=np.bool_), layout.offsets)
        else:
            length = int.from_bytes(rest[:4], "little")
            if len(rest) < 4 or length > len(rest) - 4:
                raise MessageError(f"sparse32 payload of {len(payload)} bytes announces a support of {length} bytes")
            reader = Reader(bytes(rest[4 : 4 + length]))
            places = index_coding.read(reader, layout)
            reader.finish()
            rest = rest[4 + length :]
        data = rest if form == _RAW else _decompress(rest, 4 * places.count)
        if len(data) != 4 * places.count:
            raise MessageError(f"sparse32 payload holds {len(data)} bytes of values; expected {4 * places.count}")
        values = places.room()
        cells = values[: places.count].view(np.uint8).reshape(-1, 4)
        raw = np.frombuffer(data, dtype=np.uint8)
        cells[:] = raw.reshape(4, -1).T if form == _PLANES else raw.reshape(-1, 4)
        if sys.byteorder == "big":
            values.byteswap(inplace=True)
        del data, raw
        if not np.isfinite(values).all():  # torch's takes twice the memory of the values
            raise MessageError("sparse32 payload holds NaN or infinity; expected finite values")
        return places.update(values)


def _decompress(data: memoryview, size: int) -> bytes:
    try:
        # the announced size is checked before any allocation
        frame = zstandard.get_frame_parameters(data)
        if frame.content_size != size or frame.window_size > _MAX_WINDOW:
            raise MessageError(f"sparse32 values announce {frame.content_size} bytes; expected {size}")
        decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW)
        return decompressor.decompress(data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise MessageError(f"sparse32 values are not exactly one valid zstandard frame: {error}") from error
