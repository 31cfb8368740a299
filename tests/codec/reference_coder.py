"""The entropy coder of docs/format.md written down once more, slowly and with nothing but Python integers.

Decodes what `fedfstq_hf.codec.coding.entropy.Writer` wrote; shares no code with it.
"""

import itertools
import math

PRECISION = 24
TOTAL = 1 << PRECISION


class ReferenceReader:
    """Reads symbols under models, which are lists of 24-bit frequencies."""

    def __init__(self, data):
        padded = data + bytes(-len(data) % 4)
        self.words = [int.from_bytes(padded[i : i + 4], "little") for i in range(0, len(padded), 4)]
        while self.words and self.words[-1] == 0:
            self.words.pop()
        self.state = 0
        while self.words and self.state < 1 << 32:
            self.state = self.state << 32 | self.words.pop()

    def get(self, frequencies):
        """The next symbol."""
        quantile, left = self.state & (TOTAL - 1), 0
        symbol = 0
        while quantile >= left + frequencies[symbol]:
            left += frequencies[symbol]
            symbol += 1
        self.state = (self.state >> PRECISION) * frequencies[symbol] + quantile - left
        if self.state < 1 << 32 and self.words:
            self.state = self.state << 32 | self.words.pop()
        return symbol

    def tail(self, count):
        """The bits that end the stream; checks that nothing else is left."""
        rest = list(self.words)
        state = self.state
        while state:
            rest.append(state & 0xFFFFFFFF)
            state >>= 32
        number = sum(word << 32 * i for i, word in enumerate(rest))
        assert number >> count == 1, "the stream does not end here"
        return [number >> i & 1 for i in range(count)]


def uniform(size):
    """Equally likely symbols; the last one takes what the division leaves."""
    each = TOTAL // size
    return [each] * (size - 1) + [TOTAL - each * (size - 1)]


def categorical(weights):
    """Frequencies of whole-number weights: at least 1 each."""
    scale, total, bounds = (TOTAL - len(weights)) / math.fsum(weights), 0, []
    for i, weight in enumerate(weights):
        bounds.append(int(total * scale) + i)
        total += weight
    bounds.append(TOTAL)
    return [high - low for low, high in itertools.pairwise(bounds)]


def table(weights):
    """Weights first brought to a sum of about 2^22, at least 1 each."""
    total = math.fsum(weights)
    return categorical([max(1, math.floor(w / total * (1 << 22))) for w in weights])


class Adaptive:
    """Every coded symbol makes itself and its neighbours likelier."""

    def __init__(self, size):
        self.weights = [1] * size

    def get(self, reader):
        """The next symbol."""
        symbol = reader.get(categorical(self.weights))
        gain = max(1, len(self.weights) // 16)
        for distance, share in ((-3, 1), (-2, 3), (-1, 8), (0, 48), (1, 8), (2, 3), (3, 1)):
            if 0 <= symbol + distance < len(self.weights):
                self.weights[symbol + distance] += share * gain
        return symbol
