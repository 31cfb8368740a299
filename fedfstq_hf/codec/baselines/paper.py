"""Codec `paper`: Fed-FSTQ's own rule to the letter, bits {0, 2, 4, 16} by percentile thresholds of u = F * delta^2.

Quantiser (arXiv 2604.25421): per LoRA matrix g and width b, q_max = 2^(b-1) - 1, s_g(b) = max over g of |delta| /
q_max, round to nearest, clip. The paper packs b bits per value; how it codes the map of widths it does not say, so it
gets fstq's entropy coder here, which is generous to it.

Payload: one ANS stream (entropy.py), read in this order:

| symbols | model | meaning |
|---|---|---|
| | see index_coding.py | which coordinates have b > 0 |
| 3 | uniform, 64 | frequency weight of each width |
| non-zeros | categorical | width, in coordinate order |
| 4 per non-empty tensor | uniform, 256 | largest magnitude, little-endian float32: it gives all three scales |
| values of width 2, then 4, then 16 | uniform, 2^b | quantised value + q_max, in coordinate order |

An empty update is an empty payload.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...errors import ConfigError, MessageError
from ..codec import CodecContext, Encoded, SparseUpdate, read_delta, read_fisher, register
from ..coding import index_coding
from ..coding.allocation import Draft, fill, root_weight, strongest
from ..coding.entropy import Reader, Writer, table, uniform
from ..coding.index_coding import Int64, Layout
from ..schema import Schema

WIDTHS = (2, 4, 16)
_WEIGHTS = 64
Float64 = npt.NDArray[np.float64]


@register("paper")
class PaperCodec:
    """The paper's {0, 2, 4, 16} allocation and max-scaled quantiser.

    shares: of all coordinates at 2, 4 and 16 bit if no `max_bytes` is given, the most important getting the most bits.
    With `max_bytes`, the three shares shrink or grow by one common factor until the whole message just fits.
    """

    name = "paper"
    unbiased = False

    def __init__(self, shares: Sequence[float] = (0.22, 0.06, 0.02)) -> None:
        numbers = isinstance(shares, (list, tuple)) and all(type(share) in (int, float) for share in shares)
        given = tuple(shares) if numbers else ()
        if len(given) != len(WIDTHS) or any(s < 0 for s in given) or not 0 < sum(given) <= 1:
            raise ConfigError(
                f"paper shares are {shares!r}; expected three shares, for 2, 4 and 16 bit, with a sum of at most 1"
            )
        self.shares = given

    def encode(
        self,
        delta: Mapping[str, Tensor],
        fisher: Mapping[str, Tensor] | None = None,
        *,
        max_bytes: int | None = None,
        context: CodecContext | None = None,
    ) -> Encoded:
        """Code under the paper's rule. Raises BudgetError if not even an empty update fits."""
        schema, vector = read_delta(delta)
        layout = Layout.of(schema)
        score = vector.abs() * root_weight(vector, read_fisher(schema, fisher))
        ranked = strongest(
            score.numpy(), schema.num_params if max_bytes is not None else self._count(schema.num_params)
        )
        columns = layout.columns_of(ranked)[0]

        def draft(count: int) -> Draft:
            return self._draft(layout, vector.numpy(), ranked[:count], columns[:count])

        def estimate(count: int) -> float:
            tags = -sum(s * np.log2(s / sum(self.shares)) for s in self.shares if s) / sum(self.shares)
            values = sum(n * b for n, b in zip(np.diff(self._bounds(count)), reversed(WIDTHS), strict=True))
            scales = 32 * min(count, layout.num_tensors)
            return float(index_coding.plan(layout, columns[:count]).bits + count * tags + values + scales)

        best = draft(ranked.size) if max_bytes is None else fill(draft, estimate, ranked.size, max_bytes)
        return Encoded(best.payload, best.update)

    def decode(self, payload: bytes, schema: Schema, context: CodecContext | None = None) -> SparseUpdate:
        """Sparse update of at most the schema's size. Raises MessageError on any malformed payload."""
        layout = Layout.of(schema)
        if not payload:
            return _update(layout, np.zeros(0, dtype=np.int64), np.zeros(0))
        reader = Reader(payload)
        places = index_coding.read(reader, layout)
        weights = reader.get(len(WIDTHS), uniform(_WEIGHTS))
        if not weights.any():
            raise MessageError("paper payload gives every width the frequency 0; expected one above 0")
        widths = np.zeros(places.count, dtype=np.uint8)
        reader.fill(widths, table(weights.tolist()))
        raw = reader.get(4 * int(places.used.sum()), uniform(256)).astype(np.uint8).tobytes()
        largest = np.zeros(layout.num_tensors, dtype=np.float64)
        scales = np.frombuffer(raw, dtype="<f4")
        if not np.isfinite(scales).all() or (scales < 0).any():
            raise MessageError("paper payload holds a scale that is negative or not finite")
        largest[places.used] = scales
        values = places.room()
        for number, width in enumerate(WIDTHS):
            for part in places.parts:
                mine = np.flatnonzero(widths[part.first : part.last] == number)
                levels = reader.get(mine.size, uniform(1 << width)).astype(np.int64) - _q_max(width)
                if levels.max(initial=0) > _q_max(width):
                    raise MessageError(f"paper payload holds a {width}-bit value above {_q_max(width)}")
                scale = np.broadcast_to(largest[part.tensor], levels.shape)
                values[part.first : part.last][mine] = dequantize(levels, scale, width)
        reader.finish()
        return places.update(values)

    def _draft(self, layout: Layout, vector: npt.NDArray[np.float32], ranked: Int64, columns: Int64) -> Draft:
        if not ranked.size:
            return Draft(b"", _update(layout, ranked, np.zeros(0)))
        order = np.argsort(ranked)
        indices = ranked[order]
        by_rank = np.repeat(np.arange(len(WIDTHS))[::-1], np.diff(self._bounds(ranked.size)))
        widths = by_rank[order]
        writer = Writer()
        index_coding.write(writer, layout, indices, index_coding.plan(layout, columns))
        share = np.bincount(widths, minlength=len(WIDTHS))
        weights = np.ceil(share * (_WEIGHTS - 1) / share.max())
        writer.put(weights, uniform(_WEIGHTS))
        writer.put(widths, table(weights.tolist()))
        tensor = layout.tensor_of(indices)
        used = np.bincount(tensor, minlength=layout.num_tensors) > 0
        # the maximum over the whole matrix, as the text has it, not over the coordinates that are sent
        largest = np.array([np.abs(vector[a:b]).max(initial=0) for a, b in pairwise(layout.offsets)], dtype=np.float64)
        writer.put(np.frombuffer(largest[used].astype("<f4").tobytes(), dtype=np.uint8), uniform(256))
        values = np.zeros(indices.size)
        for number, width in enumerate(WIDTHS):
            mine = widths == number
            top = largest[tensor[mine]]
            levels = quantize(vector[indices[mine]].astype(np.float64), top, width)
            writer.put(levels + _q_max(width), uniform(1 << width))
            values[mine] = dequantize(levels, top, width)
        return Draft(writer.finish(), _update(layout, indices, values))

    def _count(self, num_params: int) -> int:
        return max(1, round(sum(self.shares) * num_params))

    def _bounds(self, count: int) -> Int64:
        """Ranks at which the widths 16, 4, 2 begin and end, most important first: (4,)."""
        cumulative = np.cumsum([0.0, *reversed(self.shares)]) / sum(self.shares)
        return np.rint(cumulative * count).astype(np.int64)


def quantize(values: Float64, largest: Float64, width: int) -> Int64:
    """Integers -q_max .. q_max: values / (largest / q_max), rounded to nearest and clipped. Zero where largest is 0."""
    q_max = _q_max(width)
    ratio = np.divide(values * q_max, largest, out=np.zeros_like(values), where=largest > 0)
    return np.clip(np.rint(ratio), -q_max, q_max).astype(np.int64)


def dequantize(levels: Int64, largest: Float64, width: int) -> Float64:
    """Inverse of `quantize` up to rounding: levels * largest / q_max."""
    return levels * largest / _q_max(width)


def _q_max(width: int) -> int:
    return int((1 << (width - 1)) - 1)


def _update(layout: Layout, indices: Int64, values: Float64) -> SparseUpdate:
    return SparseUpdate(layout.num_params, torch.from_numpy(indices), torch.from_numpy(values.astype(np.float32)))
