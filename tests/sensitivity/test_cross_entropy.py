"""Weighted cross-entropy against torch's own, value and gradient."""

import pytest
import torch
import torch.nn.functional as F

from fedfstq_hf.sensitivity import objective, weighted_cross_entropy


def both(rows, vocab, dtype=torch.float64):
    torch.manual_seed(0)
    logits = (4 * torch.randn(rows, vocab, dtype=torch.float64)).to(dtype)
    targets, weights = torch.randint(0, vocab, (rows,)), 2 * torch.rand(rows, dtype=torch.float64)
    one, two = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    expected = (weights * F.cross_entropy(two.double(), targets, reduction="none")).sum()
    found = weighted_cross_entropy(one, targets, weights)
    (3 * found).backward()
    (3 * expected).backward()
    return found, expected, one.grad, two.grad


@pytest.mark.parametrize("chunk", [1, 40, 2**18])
def test_value_and_gradient(monkeypatch, chunk):
    monkeypatch.setattr(objective, "_CHUNK", chunk)
    found, expected, gradient, reference = both(7, 13)
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    assert torch.allclose(gradient, reference, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 8e-3)])
def test_low_precision_logits_are_summed_in_float32(dtype, tolerance):
    found, expected, gradient, reference = both(40, 50, dtype)
    assert found.dtype == torch.float32
    assert gradient.dtype == dtype
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert float((gradient.double() - reference.double()).abs().max()) <= tolerance * float(reference.abs().max())


def test_beside_it_stands_the_sum_in_which_all_weigh_alike():
    torch.manual_seed(0)
    logits, targets = torch.randn(5, 7, dtype=torch.float64, requires_grad=True), torch.randint(0, 7, (5,))
    loss, plain = objective.weighted_and_plain(logits, targets, torch.tensor([0.0, 2.0, 0.5, 0.0, 1.0]))
    assert plain.item() == pytest.approx(F.cross_entropy(logits, targets, reduction="sum").item(), rel=1e-12)
    assert loss.requires_grad
    assert not plain.requires_grad


def test_large_logits_do_not_overflow():
    logits = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    loss = weighted_cross_entropy(logits, torch.tensor([1]), torch.tensor([0.5]))
    loss.backward()
    assert loss.item() == 1e4
    assert logits.grad.tolist() == [[0.5, -0.5, 0.0]]


def test_no_rows():
    logits = torch.zeros(0, 5, requires_grad=True)
    loss = weighted_cross_entropy(logits, torch.zeros(0, dtype=torch.long), torch.zeros(0))
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad.shape == (0, 5)


def test_a_graph_that_is_kept_can_be_used_twice():
    logits = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    loss = weighted_cross_entropy(logits * 2, torch.tensor([0, 1, 2]), torch.ones(3))
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (second,) = torch.autograd.grad(loss, logits)
    assert torch.equal(first, second)
