"""AdapterFisher: moving averages of squared gradients against values worked out by hand."""

import pytest
import torch

from fedfstq_hf.errors import AdapterMismatchError, ConfigError, NonFiniteError
from fedfstq_hf.sensitivity import AdapterFisher
from fedfstq_hf.sensitivity.fisher import second_moments


def make(rho=0.9):
    return AdapterFisher([torch.zeros(2), torch.zeros(1, 1)], rho)


def test_bias_corrected_average_in_the_order_of_params():
    fisher = make()
    assert fisher.vector().tolist() == [0.0, 0.0, 0.0]
    fisher.update([torch.tensor([1.0, -2.0]), torch.tensor([[3.0]])])
    assert fisher.vector().tolist() == pytest.approx([1.0, 4.0, 9.0])
    fisher.update([torch.tensor([2.0, 0.0]), torch.tensor([[1.0]])])
    # (0.9 * 0.1 * g1^2 + 0.1 * g2^2) / (1 - 0.81)
    assert fisher.vector().tolist() == pytest.approx([0.49 / 0.19, 0.36 / 0.19, 0.91 / 0.19])


def test_constant_gradients_give_their_square_at_any_step():
    fisher = make(rho=0.99)
    for _ in range(7):
        fisher.update([torch.tensor([0.5, 3.0]), torch.tensor([[2.0]])])
        assert fisher.vector().tolist() == pytest.approx([0.25, 9.0, 4.0], rel=1e-5)


def test_missing_gradients_count_as_zero():
    fisher = make()
    fisher.update([torch.tensor([1.0, 1.0]), torch.tensor([[1.0]])])
    fisher.update([None, torch.tensor([[1.0]])])
    assert fisher.vector().tolist() == pytest.approx([0.09 / 0.19, 0.09 / 0.19, 1.0])


def test_low_precision_gradients_are_squared_in_float32():
    fisher = make()
    fisher.update([torch.tensor([1e-5, 1e-5], dtype=torch.float16), torch.zeros(1, 1, dtype=torch.bfloat16)])
    assert fisher.vector()[0] == pytest.approx(1e-10, rel=0.02)


def test_low_precision_gradients_have_their_norm_in_float32():
    """The largest float16 is 65504: two of 60000 are finite, and their norm is 84853."""
    fisher = make()
    fisher.update([torch.tensor([6e4, 6e4], dtype=torch.float16), torch.zeros(1, 1)])
    assert fisher.vector().tolist() == pytest.approx([3.6e9, 3.6e9, 0.0], rel=1e-3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_a_non_finite_gradient_changes_nothing(bad):
    fisher = make()
    fisher.update([torch.ones(2), torch.ones(1, 1)])
    before = fisher.state_dict()
    with pytest.raises(NonFiniteError):
        fisher.update([torch.tensor([1.0, bad]), torch.ones(1, 1)])
    assert torch.equal(fisher.state_dict()["ema"], before["ema"])
    assert fisher.state_dict()["steps"] == before["steps"] == 1


@pytest.mark.parametrize("gradients", [(1.5e19, 1.5e19), (1.5e19, -1.7e19)])
def test_a_squared_norm_that_overflows_changes_nothing(gradients):
    """Each gradient and each tensor's norm is finite, and so are their squares; the sum of those is not."""
    fisher = make()
    with pytest.raises(NonFiniteError):
        fisher.update([torch.tensor([gradients[0], 0.0]), torch.tensor([[gradients[1]]])])
    assert fisher.vector().tolist() == [0.0, 0.0, 0.0]
    fisher.update([torch.tensor([1e18, 0.0]), torch.ones(1, 1)])
    assert fisher.vector()[0].item() == pytest.approx(1e36, rel=1e-5)


def test_second_moments_of_adam_are_corrected_by_its_own_second_decay():
    """Constant gradients: the corrected average is their square after any number of steps."""
    used, frozen, unused = (torch.nn.Parameter(torch.zeros(2)) for _ in range(3))
    frozen.requires_grad_(False)
    optimizer = torch.optim.Adam([used, unused], lr=0.0, betas=(0.5, 0.75))
    for _ in range(3):
        used.grad = torch.tensor([2.0, -3.0])
        optimizer.step()
        moments = second_moments(optimizer, [used, frozen, unused])
        assert moments.tolist() == pytest.approx([4.0, 9.0, 0.0, 0.0, 0.0, 0.0])
    plain = torch.optim.SGD([used], lr=0.1, momentum=0.9)
    plain.step()
    with pytest.raises(ConfigError, match=r"keeps momentum_buffer\. Use optim='adamw_torch'"):
        second_moments(plain, [used])


def test_reset_and_state():
    fisher, other = make(), make()
    for gradient in (1.0, 2.0):
        fisher.update([torch.tensor([gradient, 3.0]), torch.tensor([[5.0]])])
    other.load_state_dict(fisher.state_dict())
    assert torch.equal(fisher.vector(), other.vector())
    fisher.update([torch.zeros(2), torch.ones(1, 1)])
    other.update([torch.zeros(2), torch.ones(1, 1)])
    assert torch.equal(fisher.vector(), other.vector())
    fisher.reset()
    assert fisher.vector().tolist() == [0.0, 0.0, 0.0]
    fisher.update([torch.tensor([1.0, 2.0]), torch.ones(1, 1)])
    assert fisher.vector().tolist() == pytest.approx([1.0, 4.0, 1.0])


def test_bad_input():
    with pytest.raises(AdapterMismatchError, match="got 1"):
        make().update([torch.ones(2)])
    with pytest.raises(AdapterMismatchError, match=r"\(3,\)"):
        make().load_state_dict({"ema": torch.zeros(4), "steps": torch.tensor(1)})
    with pytest.raises(ConfigError, match="rho"):
        make(rho=-0.1)
    assert AdapterFisher([]).vector().tolist() == []
