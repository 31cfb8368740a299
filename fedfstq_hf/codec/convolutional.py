"""Signs by a convolutional code: a vector of any length as the nearest path through a trellis, one bit a step.

A register holds the step's bit and the 8 before it. Each sign of a step is the parity of some of these nine bits, and
the nearest of all paths is found by the Viterbi algorithm (Viterbi and Omura 1974, "Trellis encoding of memoryless
discrete-time sources with a fidelity criterion"): long codewords, which say more per bit than short ones, at a cost
that grows with the vector's length only. How much more: docs/codecs.md.

count signs are laid over `steps` steps row by row: sign j belongs to step j mod steps, row j // steps. Step t belongs
to stream t mod S at time t // S, S = ceil(steps / 1024). Streams begin with a register of zeros; they are there to be
worked on side by side, and so that a path can be traced back in little memory.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .codec import runs

Bool = npt.NDArray[np.bool_]
Float32 = npt.NDArray[np.float32]
UInt16 = npt.NDArray[np.uint16]

MEMORY = 8
_STATES = 1 << MEMORY
_HALF = _STATES // 2
_TIMES = 1024  # steps of a stream, at most
_STREAMS = 64  # worked on at a time
_UNIT = 32  # paths are compared in whole numbers, 1 / 32 of a unit: exact in float32, the same on every machine
_PARITY = np.array([i.bit_count() % 2 for i in range(2 * _STATES)], dtype=np.bool_)

ROWS = _HALF
"""Rows that differ in what they look at; row r looks at the bits that row r - ROWS does."""


def taps(row: int) -> int:
    """The register's bits that a row's signs are the parity of, as a number: bit k is the bit of k steps ago.

    The first and the last are always among them, so that two paths that part or meet there differ in all signs; what
    lies between goes through all 128 patterns before it repeats one. What it reaches: recipes/benchmarks/sign_codes.py.
    """
    return _STATES | (93 * (row + 1) + 11) % ROWS << 1 | 1


_TAPS = np.array([taps(row) for row in range(ROWS)], dtype=np.uint16)
_FROM_ZERO = np.arange(0, _STATES, 2, dtype=np.uint16)
"""Registers whose newest and oldest bits are 0: steps from the states 0 .. 127 with bit 0."""


def signs(register: UInt16, start: int, end: int) -> Bool:
    """Whether the signs `start .. end` are minus, (end - start,). register: of the path's steps, by `registers`."""
    row, step = np.divmod(np.arange(start, end), len(register))
    minus: Bool = _PARITY[register[step] & _TAPS[row % ROWS]]
    return minus


def nearest_path(sample: Float32, steps: int) -> Bool:
    """Bits of the path whose signs have the largest scalar product with `sample`, (steps,).

    sample: (count,), in units that make its parts comparable. steps: at least 1.
    """
    rows = _folded(sample, steps)
    streams = -(-steps // _TIMES)
    bits = np.empty((-(-steps // streams), streams), dtype=np.bool_)
    code = np.where(_PARITY[_FROM_ZERO[:, None] & _TAPS[: len(rows)]], np.float32(-1), np.float32(1))
    for first in range(0, streams, _STREAMS):
        last = min(first + _STREAMS, streams)
        bits[:, first:last] = _viterbi(rows, code, streams, first, last)
    return bits.reshape(-1)[:steps]


def _viterbi(rows: Float32, code: Float32, streams: int, first: int, last: int) -> Bool:
    """Best paths of the streams `first .. last`, (times, last - first).

    rows: (number of rows, steps). code: +1 and -1 for each register of `_FROM_ZERO` and row. Of state s < 128, the 8
    latest bits, the step with bit 0 scores m[s]; with bit 1, or from state s + 128, it scores - m[s], with both m[s].
    """
    steps, width = rows.shape[1], last - first
    times = -(-steps // streams)
    score = np.full((_STATES, width), -1e9, dtype=np.float32)
    score[0] = 0
    following = np.empty_like(score)
    upper = np.empty((times, _STATES, width), dtype=np.bool_)  # whether a state was reached from the upper half
    low, high = np.empty((_HALF, width), dtype=np.float32), np.empty((_HALF, width), dtype=np.float32)
    for time in range(times):
        here = rows[:, time * streams + first : min(time * streams + last, steps)]
        if here.shape[1] < width:  # the last step of some streams; for the others nothing is at stake
            here = np.pad(here, ((0, 0), (0, width - here.shape[1])))
        m = code @ here
        for bit, (one, other) in enumerate(((np.add, np.subtract), (np.subtract, np.add))):
            one(score[:_HALF], m, out=low)
            other(score[_HALF:], m, out=high)
            np.maximum(low, high, out=following[bit::2])
            np.less(low, high, out=upper[time, bit::2])
        score, following = following, score
    state, column = score.argmax(0), np.arange(width)
    bits = np.empty((times, width), dtype=np.bool_)
    for time in range(times - 1, -1, -1):
        bits[time] = state & 1
        state = state >> 1 | upper[time, state, column].astype(state.dtype) << (MEMORY - 1)
    return bits


def _folded(sample: Float32, steps: int) -> Float32:
    """The sample in whole units, (rows, steps), at most ROWS: rows that look at the same bits add up."""
    rows = -(-len(sample) // steps)
    rows = rows if rows < ROWS else -(-rows // ROWS) * ROWS
    units = np.zeros(rows * steps, dtype=np.float32)
    units[: len(sample)] = np.rint(sample * np.float32(_UNIT))
    return units.reshape(rows, steps) if rows <= ROWS else units.reshape(-1, ROWS, steps).sum(0)


def registers(bits: Bool) -> UInt16:
    """Each step's bit and the 8 before it in its stream, (steps,): bit k of a register is the bit of k steps ago."""
    streams = -(-len(bits) // _TIMES)
    register = np.zeros(len(bits), dtype=np.uint16)
    for start, end in runs(0, len(bits)):
        for ago in range(MEMORY + 1):
            first = max(start, ago * streams)
            before = bits[first - ago * streams : max(first, end) - ago * streams]
            register[first:end] |= before.astype(np.uint16) << np.uint16(ago)
    return register
