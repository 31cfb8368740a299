"""Entropy coding on top of constriction's ANS coder: symbols in, bytes out, with no framing at all.

Every probability is an integer weight derived by exactly rounded arithmetic, so that both sides build the same tables
on any machine. A stream carries no length: the reader asks for as many symbols as the schema and earlier symbols imply,
and the coder must come out empty.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import constriction
import numpy as np
import numpy.typing as npt

from ...errors import MessageError

IntArray = npt.NDArray[np.int32]
_PIECE = 1 << 14  # symbols read at a time
_TOTAL = 1 << 22  # sum of a table's weights: below constriction's 24 bits of precision, and exact in float64
# weight that a coded symbol lends to itself and its neighbours, times size / 16; every symbol starts at 1
_KERNEL = np.array([1, 3, 8, 48, 8, 3, 1])


def table(weights: Sequence[float]) -> Any:
    """Categorical model over `len(weights)` symbols, P proportional to the weights (not all 0), floored at 2^-22."""
    total = math.fsum(weights)
    scaled = [max(1.0, math.floor(w / total * _TOTAL)) for w in weights]
    return constriction.stream.model.Categorical(np.array(scaled, dtype=np.float64), perfect=False)


@lru_cache(maxsize=4096)
def coin(ones: int, zeros: int) -> Any:
    """Model of one bit with P(1) = ones / (ones + zeros)."""
    return table([zeros, ones])


@lru_cache(maxsize=64)
def uniform(size: int) -> Any:
    """Model of `size` equally likely symbols, 2 <= size <= 2^16."""
    return constriction.stream.model.Uniform(size)


class Adaptive:
    """Adaptive model of slowly varying integers 0 .. size - 1: each symbol makes itself and its neighbours likelier."""

    def __init__(self, size: int) -> None:
        # a margin on both sides, so that the kernel never leaves the array
        self._weights = np.ones(size + len(_KERNEL) - 1)
        self._margin = len(_KERNEL) // 2
        self._size = size
        self._gain = _KERNEL * max(1, size // 16)

    def model(self) -> Any:
        """Model of the next symbol."""
        inner = self._weights[self._margin : self._margin + self._size]
        return constriction.stream.model.Categorical(inner, perfect=False)

    def see(self, symbol: int) -> None:
        """Learn from a coded symbol. Weights stay integers, hence exact."""
        self._weights[symbol : symbol + len(_KERNEL)] += self._gain


class Bits:
    """The bits that end a stream, read in order; one byte holds eight until they are."""

    def __init__(self, packed: bytes) -> None:
        self._packed = np.frombuffer(packed, dtype=np.uint8)
        self._start = 0

    def take(self, count: int) -> npt.NDArray[np.bool_]:
        """The next `count` of them, (count,)."""
        start, end = self._start, self._start + count
        bits = np.unpackbits(self._packed[start // 8 : -(-end // 8)], bitorder="little")
        self._start = end
        return bits[start % 8 : start % 8 + count].view(np.bool_)


class Writer:
    """Collects symbols in the order in which they will be read; `finish` codes them (ANS runs backwards)."""

    def __init__(self) -> None:
        self._segments: list[tuple[IntArray, Any]] = []

    def put(self, symbols: npt.ArrayLike, model: Any) -> None:
        """Append symbols (any shape, read as int32) under one model."""
        array = np.ascontiguousarray(symbols, dtype=np.int32).reshape(-1)
        if array.size:
            self._segments.append((array, model))

    def put_adaptive(self, symbols: Sequence[int], model: Adaptive) -> None:
        """Append symbols under an adaptive model."""
        for symbol in symbols:
            self.put([symbol], model.model())
            model.see(symbol)

    def finish(self, tail: npt.ArrayLike = ()) -> bytes:
        """The coded bytes, without trailing zeros (the reader supplies them).

        tail: equally likely bits, read last, at exactly one bit each. They become the coder's first state, which would
        otherwise waste up to 3 bytes; a 1 after the last of them marks their end.
        """
        coder = constriction.stream.stack.AnsCoder(_words(_packed_tail(np.asarray(tail, dtype=np.uint8))))
        for symbols, model in reversed(self._segments):
            coder.encode_reverse(symbols, model)
        words: npt.NDArray[np.uint32] = coder.get_compressed()
        return words.astype("<u4").tobytes().rstrip(b"\0")


class Reader:
    """Reads what a Writer wrote. Any bytes decode to some symbols; `finish` tells whether they were well formed."""

    def __init__(self, data: bytes) -> None:
        if not data or data.endswith(b"\0"):
            raise MessageError("entropy-coded stream is empty or ends in a zero byte; a well-formed stream never does")
        self._coder = constriction.stream.stack.AnsCoder(_words(data))

    def get(self, count: int, model: Any) -> IntArray:
        """The next `count` symbols, int32 (count,)."""
        if count == 0:
            return np.zeros(0, dtype=np.int32)
        symbols: IntArray = self._coder.decode(model, count)
        return symbols

    def fill(self, out: npt.NDArray[np.integer[Any]], model: Any) -> None:
        """The next symbols into all of an array, in pieces: it may be of a smaller type than symbols are."""
        for start in range(0, out.size, _PIECE):
            piece = out[start : start + _PIECE]
            piece[:] = self.get(piece.size, model)

    def get_adaptive(self, count: int, model: Adaptive) -> list[int]:
        """The next `count` symbols of an adaptive model."""
        symbols = []
        for _ in range(count):
            symbol = int(self.get(1, model.model())[0])
            model.see(symbol)
            symbols.append(symbol)
        return symbols

    def finish(self, tail: int = 0) -> Bits:
        """The `tail` bits that end the stream. Raises MessageError unless exactly they are left."""
        size = tail // 8 + 1
        if self._coder.num_words() == -(-size // 4):
            left = self._coder.get_compressed().astype("<u4").tobytes().rstrip(b"\0")
            if len(left) == size and left[-1] >> tail % 8 == 1:
                return Bits(left)
        raise MessageError("entropy-coded stream does not end where its symbols do; the payload is malformed")


def _packed_tail(bits: npt.NDArray[np.uint8]) -> bytes:
    return np.packbits(np.append(bits, np.uint8(1)), bitorder="little").tobytes()


def _words(data: bytes) -> npt.NDArray[np.uint32]:
    return np.frombuffer(data + bytes(-len(data) % 4), dtype="<u4").astype(np.uint32)
