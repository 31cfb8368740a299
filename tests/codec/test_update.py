"""SparseUpdate: adding is the dense addition, in the accumulator's dtype."""

import itertools
import math

import pytest
import torch

from fedfstq_hf.codec import SparseUpdate


def sparse():
    return SparseUpdate(5, torch.tensor([0, 3]), torch.tensor([3.0, -4.0]))


def test_basics():
    assert sparse().nnz == 2
    assert sparse().norm() == 5.0
    assert sparse().to_dense().tolist() == [3.0, 0.0, 0.0, -4.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_add_to_equals_dense_addition_bit_for_bit(dtype):
    start = torch.randn(5, generator=torch.Generator().manual_seed(0)).to(dtype)
    acc, dense_acc = start.clone(), start.clone()
    sparse().add_to(acc, 0.3)
    SparseUpdate(5, None, sparse().to_dense()).add_to(dense_acc, 0.3)
    assert torch.equal(acc, dense_acc)
    assert torch.equal(acc, start + sparse().to_dense().to(dtype) * 0.3)


def test_weights_are_applied_in_the_accumulators_precision():
    acc = torch.zeros(1, dtype=torch.float64)
    SparseUpdate(1, torch.tensor([0]), torch.tensor([1.0])).add_to(acc, 1 / 3)
    assert acc.item() == 1 / 3


def test_to_dense_does_not_alias():
    values = torch.ones(3)
    SparseUpdate(3, None, values).to_dense()[0] = 7.0
    assert values[0] == 1.0


def uneven(count):
    """(count,) float32 over six octaves, made by steps that are exact or rounded alike on every processor."""
    numbers = torch.arange(count, dtype=torch.float64)
    return ((1.0 + numbers * 0.6180339887 % 1.0) * 2.0 ** (numbers % 7)).float()


def test_norm_is_the_same_for_any_number_of_threads():
    """Which sums a reduction makes depends on how many threads share it, a norm must not."""
    values, threads = uneven(400_000), torch.get_num_threads()
    updates = [SparseUpdate(400_000 - cut, None, values[cut:]) for cut in range(0, 50_000, 10_000)]
    try:
        norms = []
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            norms.append([update.norm().hex() for update in updates])
    finally:
        torch.set_num_threads(threads)
    assert norms[1:] == norms[:1] * 3


@pytest.mark.parametrize("count", [1, 2, 3, 1000, 5000, 5001, 5002, 5003, (1 << 17) + 5])
def test_norm_adds_in_an_order_that_no_processor_chooses(count):
    """Halves are added to each other; Python's floats are those of every processor."""
    values = uneven(count)
    total = 0.0
    for start in range(0, count, 1 << 17):
        squares = [value * value for value in values[start : start + (1 << 17)].tolist()]
        while len(squares) > 1:
            half = (len(squares) + 1) // 2
            squares = [a + b for a, b in itertools.zip_longest(squares[:half], squares[half:], fillvalue=0.0)]
        total += squares[0]
    assert SparseUpdate(count, None, values).norm() == math.sqrt(total)
    assert math.sqrt(total) == pytest.approx(math.sqrt(math.fsum(v * v for v in values.tolist())), rel=1e-14)


def test_norm_is_finite_exactly_if_every_value_is():
    largest = torch.finfo(torch.float32).max
    assert SparseUpdate(4, None, torch.full((4,), largest)).norm() == 2 * largest
    assert SparseUpdate(3, torch.tensor([1]), torch.tensor([math.inf])).norm() == math.inf
    assert math.isnan(SparseUpdate(3, torch.tensor([1]), torch.tensor([math.nan])).norm())
    assert SparseUpdate(3, torch.tensor([], dtype=torch.int64), torch.tensor([])).norm() == 0.0
    values = torch.tensor([3.0, 4.0])
    SparseUpdate(2, None, values).norm()
    assert values.tolist() == [3.0, 4.0]


@pytest.mark.parametrize("value", [3e38, 1e25, 1e-30])
@pytest.mark.parametrize("size", [4, 2**18 + 5])
def test_a_norm_is_finite_and_right_where_squares_are_beyond_float32(value, size):
    assert SparseUpdate(size, None, torch.full((size,), value)).norm() == pytest.approx(value * size**0.5, rel=1e-6)
