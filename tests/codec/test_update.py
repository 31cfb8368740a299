"""SparseUpdate: adding is the dense addition, in the accumulator's dtype."""

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


@pytest.mark.parametrize("value", [3e38, 1e25, 1e-30])
@pytest.mark.parametrize("size", [4, 2**18 + 5])
def test_a_norm_is_finite_and_right_where_squares_are_beyond_float32(value, size):
    assert SparseUpdate(size, None, torch.full((size,), value)).norm() == pytest.approx(value * size**0.5, rel=1e-6)
