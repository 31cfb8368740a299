"""Codewords: the nearest one is found, is named as the docstring says, and says as much as the table has it."""

import itertools

import numpy as np
import pytest

from fedfstq_hf.codec.codewords import LARGEST, best_exponent, nearest_codewords, signs


def all_codewords(exponent):
    """(sign, number) -> +1 and -1, (d,), by counting common bits."""
    d = 1 << exponent
    rows = [[(-1) ** (i & j).bit_count() for j in range(d)] for i in range(d)]
    return {(sign, i): (-1) ** sign * np.array(rows[i]) for sign, i in itertools.product((0, 1), range(d))}


@pytest.mark.parametrize("exponent", [0, 1, 2, 4, 6])
def test_the_nearest_of_all_codewords_is_found(exponent):
    d, blocks = 1 << exponent, 30
    sample = np.random.default_rng(0).standard_normal(d * blocks).astype(np.float32)
    negative, number = nearest_codewords(sample, exponent)
    words = all_codewords(exponent)
    for b in range(blocks):
        block = sample[b::blocks]
        best = max(words, key=lambda word: float(words[word] @ block))
        assert (int(negative[b]), int(number[b])) == best


@pytest.mark.parametrize("exponent", [0, 2, 5, 10])
def test_signs_are_those_of_the_codeword(exponent):
    rng = np.random.default_rng(exponent)
    words, d = all_codewords(exponent) if exponent < 10 else None, 1 << exponent
    negative = rng.integers(0, 2, 20).astype(bool)
    number = rng.integers(0, d, 20).astype(np.uint16)
    every = signs(negative, number, 0, 20 * d)
    assert np.array_equal(signs(negative, number, 7, 20 * d - 3), every[7:-3])
    for place in range(d):
        minus = every[20 * place :][:20]
        for b in range(20):
            expected = (int(number[b]) & place).bit_count() % 2 ^ int(negative[b])
            assert minus[b] == expected
            assert words is None or words[int(negative[b]), int(number[b])][place] == (-1) ** expected


def test_a_sample_that_is_no_multiple_of_the_block_is_filled_with_zeros():
    sample = np.random.default_rng(1).standard_normal(70).astype(np.float32)
    short, filled = nearest_codewords(sample, 4)[1], np.zeros(80, dtype=np.float32)
    filled[:70] = sample
    assert np.array_equal(short, nearest_codewords(filled, 4)[1])
    assert len(short) == 5


def test_nothing_has_no_codewords():
    assert [len(part) for part in nearest_codewords(np.zeros(0, dtype=np.float32), 3)] == [0, 0]


def test_many_blocks_are_worked_on_in_pieces_that_do_not_show():
    sample = np.random.default_rng(2).standard_normal(3 << 18).astype(np.float32)
    negative, number = nearest_codewords(sample, 3)
    blocks = len(number)
    for b in (0, 1, (1 << 15) - 1, 1 << 15, blocks - 1):
        alone = nearest_codewords(np.ascontiguousarray(sample[b::blocks]), 3)
        assert (negative[b], number[b]) == (alone[0][0], alone[1][0])


@pytest.mark.parametrize("exponent", range(len(LARGEST)))
def test_the_table_is_the_mean_of_the_largest_of_so_many_normals(exponent):
    largest = np.abs(np.random.default_rng(0).standard_normal((20_000, 1 << exponent), dtype=np.float32)).max(1)
    assert LARGEST[exponent] == pytest.approx(float(largest.mean()), abs=5 * float(largest.std()) / 20_000**0.5)


@pytest.mark.parametrize(
    ("bits_per_coordinate", "exponent"),
    [(1.0, 0), (0.85, 0), (0.7, 2), (0.5, 3), (0.19, 5), (0.11, 6), (0.02, 9), (0.001, 10)],
)
def test_blocks_are_as_long_as_the_budget_asks(bits_per_coordinate, exponent):
    assert best_exponent(round(bits_per_coordinate * 1_000_000), 1_000_000) == exponent


@pytest.mark.parametrize("bits_per_coordinate", [0.9, 0.6, 0.3, 0.1, 0.04])
def test_the_block_that_is_chosen_leaves_the_least_error(bits_per_coordinate):
    rng = np.random.default_rng(3)
    count = 60_000
    vector = rng.standard_normal(count).astype(np.float32)

    def error(m):
        part = int(min(count, count * bits_per_coordinate * (1 << m) / (1 + m)))
        chosen = np.sort(rng.permutation(count)[:part])
        word = np.where(signs(*nearest_codewords(vector[chosen], m), 0, part), -1.0, 1.0)
        decoded = np.zeros(count)
        decoded[chosen] = word * (vector[chosen] @ vector[chosen] / (word @ vector[chosen])) * count / part
        return float(((decoded - vector) ** 2).sum())

    errors = {m: error(m) for m in (0, 2, 3, 4, 5, 6, 7, 8)}
    assert errors[best_exponent(round(count * bits_per_coordinate), count)] < 1.03 * min(errors.values())
