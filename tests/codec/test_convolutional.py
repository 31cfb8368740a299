"""The convolutional code: signs are parities of the register, the path is the best of all, and says what it should."""

import itertools

import numpy as np
import pytest

from fedfstq_hf.codec import convolutional
from fedfstq_hf.codec.convolutional import ROWS, nearest_path, registers, signs, taps


def normal(count, seed=0):
    return np.random.default_rng(seed).standard_normal(count).astype(np.float32)


def along(sample, path):
    """Scalar product of a sample in whole units with the signs of a path."""
    whole = np.rint(sample * 32).astype(np.float64)
    return float(np.where(signs(registers(path), 0, len(sample)), -whole, whole).sum())


def by_hand(path, count):
    """Signs from the docstring: a register of nine bits for each stream, filled from zero."""
    steps = len(path)
    streams = -(-steps // 1024)
    minus = [False] * count
    for stream in range(streams):
        register = [False] * 9
        for step in range(stream, steps, streams):
            register = [bool(path[step]), *register[:8]]
            for row, j in enumerate(range(step, count, steps)):
                minus[j] = sum(bit for k, bit in enumerate(register) if taps(row % ROWS) >> k & 1) % 2 == 1
    return minus


@pytest.mark.parametrize(("count", "steps"), [(1, 1), (30, 10), (37, 10), (2500, 2100), (5000, 12), (9, 9)])
def test_signs_are_the_parities_of_the_register(count, steps):
    path = np.random.default_rng(steps).integers(0, 2, steps).astype(bool)
    every = signs(registers(path), 0, count)
    assert every.tolist() == by_hand(path, count)
    assert np.array_equal(
        signs(registers(path), count // 3, count - count // 4), every[count // 3 : count - count // 4]
    )


@pytest.mark.parametrize(("count", "steps"), [(12, 12), (31, 10), (50, 11), (700, 4), (5, 1)])
def test_the_path_is_the_best_of_all(count, steps):
    for seed in range(5):
        sample = normal(count, seed)
        best = max(along(sample, np.array(path)) for path in itertools.product((False, True), repeat=steps))
        assert along(sample, nearest_path(sample, steps)) == best > 0


def test_streams_do_not_know_of_each_other():
    steps, streams = 2 * 1024 + 700, 3
    sample = normal(3 * steps)
    path = nearest_path(sample, steps)
    for stream in range(streams):
        own = np.concatenate([sample[row * steps : (row + 1) * steps][stream::streams] for row in range(3)])
        alone = nearest_path(own, len(own) // 3)
        assert np.array_equal(path[stream::streams], alone)


def test_many_streams_are_worked_on_in_pieces_that_do_not_show(monkeypatch):
    sample, steps = normal(40_000), 20_000
    path = nearest_path(sample, steps)
    monkeypatch.setattr(convolutional, "_STREAMS", 7)
    assert np.array_equal(path, nearest_path(sample, steps))


def test_rows_that_look_at_the_same_bits_add_up():
    assert [taps(row) for row in range(ROWS)] == [taps(row + ROWS) for row in range(ROWS)]
    assert len({taps(row) for row in range(ROWS)}) == ROWS
    sample = normal(3 * ROWS * 5)
    added = np.rint(sample * 32).reshape(3, -1).sum(0).astype(np.float32) / 32
    assert np.array_equal(nearest_path(sample, 5), nearest_path(added, 5))


def test_any_row_begins_and_ends_with_a_tap():
    assert all(taps(row) & 1 and taps(row) >> 8 == 1 for row in range(ROWS))


# least error of an unbiased code at R bits: 1 / (2^(2 R) - 1)
@pytest.mark.parametrize(("bits", "above"), [(0.5, 1.15), (1 / 3, 1.14), (0.25, 1.14), (0.1, 1.14), (0.02, 1.14)])
def test_the_error_is_near_the_least_that_any_code_leaves(bits, above):
    sample = normal(200_000)
    minus = signs(registers(nearest_path(sample, round(bits * len(sample)))), 0, len(sample))
    word = np.where(minus, -1.0, 1.0)
    captured = float(word @ sample) ** 2 / len(sample) / float(sample @ sample)
    least = 1 / (2 ** (2 * bits) - 1)
    assert least < 1 / captured - 1 < above * least


def test_one_bit_for_each_sign_says_them():
    sample = normal(5000)
    assert (signs(registers(nearest_path(sample, 5000)), 0, 5000) == (sample < 0)).mean() > 0.99
