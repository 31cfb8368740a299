"""Codewords of signs: d = 2^m signs in 1 + m bits, as a codeword of the first-order Reed-Muller code.

The 2 d codewords are the rows of the Hadamard matrix of order d, in the natural order, and their negatives: sign j of
number i is minus where i and j have an odd number of common bits. The nearest to a vector belongs to the largest
coefficient of its Hadamard transform. With the vector's signs flipped at random beforehand this is cross-polytope
rounding after a random rotation (Gandikota et al. 2019, https://arxiv.org/abs/1911.07971, who draw the codeword at
random where this takes the nearest).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Bool = npt.NDArray[np.bool_]
Float32 = npt.NDArray[np.float32]
UInt16 = npt.NDArray[np.uint16]
_COLUMNS = 1 << 18  # coordinates whose transform is taken at a time

LARGEST = (0.7979, 1.1284, 1.4647, 1.7834, 2.0772, 2.3471, 2.5961, 2.8276, 3.0442, 3.2484, 3.4419)
"""Mean of the largest absolute value of 2^m standard normals, m = 0 .. 10: the longer, the more a codeword says."""

_PARITY = np.array([i.bit_count() % 2 for i in range(1 << (len(LARGEST) - 1))], dtype=np.bool_)
_EXPONENTS: tuple[int, ...] = (0, *range(2, len(LARGEST)))  # two signs say as much as a codeword of two


def signs(negative: Bool, number: UInt16, start: int, end: int) -> Bool:
    """Whether the signs `start .. end` of all that the codewords have are minus.

    negative, number: of the codewords (blocks,). Sign j is at place j // blocks of codeword j % blocks.
    """
    blocks, minus = len(negative), np.empty(end - start, dtype=np.bool_)
    for place in range(start // blocks, -(-end // blocks)):
        first, last = max(start, place * blocks), min(end, (place + 1) * blocks)
        here = slice(first - place * blocks, last - place * blocks)
        minus[first - start : last - start] = negative[here] ^ _PARITY[number[here] & np.uint16(place)]
    return minus


def nearest_codewords(sample: Float32, exponent: int) -> tuple[Bool, UInt16]:
    """Sign and number of each block's nearest codeword, (blocks,).

    sample: (count,), in units that make its parts comparable. Of ceil(count / d) blocks, block b has coordinates b,
    b + blocks, b + 2 blocks, .. and zeros where there are none.
    """
    d, count = 1 << exponent, len(sample)
    blocks = -(-count // d)
    negative, number = np.empty(blocks, dtype=np.bool_), np.empty(blocks, dtype=np.uint16)
    columns = max(1, _COLUMNS // d)
    for first in range(0, blocks, columns):
        last = min(first + columns, blocks)
        block = np.zeros((d, last - first), dtype=np.float32)
        for place in range(d):
            piece = sample[place * blocks + first : min(place * blocks + last, count)]
            block[place, : len(piece)] = piece
        _hadamard(block)
        largest = np.abs(block).argmax(0)
        negative[first:last] = np.take_along_axis(block, largest[None], 0)[0] < 0
        number[first:last] = largest
    return negative, number


def best_exponent(bits: int, coordinates: int) -> int:
    """m of the codewords that leave the least error when they take so many bits together.

    A block of d standard normals has length LARGEST[m] in the direction of its codeword's d signs, divided by sqrt(d):
    the unbiased multiple is off by d / LARGEST[m]^2 - 1 of the block's square. Sent of a share p of the coordinates
    only and divided by p, it is off by d / (p LARGEST[m]^2) - 1.
    """

    def says(m: int) -> float:
        return float(min(1.0, (bits / (1 + m)) * (1 << m) / coordinates) * LARGEST[m] ** 2 / (1 << m))

    return max(_EXPONENTS, key=says)


def _hadamard(block: Float32) -> None:
    """Replace each column (d, columns) by its Hadamard transform, not scaled, in the natural order."""
    d = block.shape[0]
    step = 1
    while step < d:
        pairs = block.reshape(d // (2 * step), 2, step, -1)
        difference = pairs[:, 0] - pairs[:, 1]
        pairs[:, 0] += pairs[:, 1]
        pairs[:, 1] = difference
        step *= 2
