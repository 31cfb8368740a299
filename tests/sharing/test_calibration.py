"""Fisher information from a calibration set, and what is read out of it."""

import pytest
import torch
from tiny import make_tiny_data

from fedfstq_hf.errors import DataError, NonFiniteError
from fedfstq_hf.sharing.calibration import adapter_fisher, pair_weights
from fedfstq_hf.sharing.trained import Pair, trained_adapter
from fedfstq_hf.workloads import collate
from tests.sharing.conftest import trained


def batches(count=3):
    return [collate(make_tiny_data(2, seed=seed), 0) for seed in range(count)]


def test_it_is_the_mean_squared_gradient_and_leaves_the_model_as_it_was():
    model = trained().train()
    adapter = trained_adapter(model)
    for parameter in adapter.parameters.values():
        parameter.requires_grad_(False)
    fisher, examples = adapter_fisher(model, adapter.parameters, batches())
    assert examples == 6
    assert model.training
    assert not any(p.requires_grad for p in adapter.parameters.values())
    assert all(p.grad is None for p in model.parameters())
    name = adapter.pairs[3].a
    parameter = adapter.parameters[name].requires_grad_(True)
    model.eval()
    squares = [torch.autograd.grad(model(**batch).loss, parameter)[0].square() for batch in batches()]
    torch.testing.assert_close(fisher[name], torch.stack(squares).mean(0), rtol=1e-3, atol=1e-12)


def test_an_exact_product_of_weights_is_found_again():
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(3, 8, generator=generator), torch.randn(5, 3, generator=generator)
    of_input = 1 + torch.rand(8, generator=generator)
    of_output = 1 + torch.rand(5, generator=generator)
    of_input, of_output = of_input / of_input.mean(), of_output / of_output.mean()
    # what the gradient of an error g_o x_i in the product gives on the diagonal, for independent g and x
    pair, scale = Pair("m", "a", "b"), 0.7
    fisher = {
        "a": scale * (b.square() * of_output[:, None]).sum(0)[:, None] * of_input,
        "b": scale * of_output[:, None] * (a.square() * of_input).sum(1),
    }
    # sums over the other side count it as often as that side is long
    weights = pair_weights({"a": a, "b": b}, fisher, pair)
    for found, factor in ((weights.input, of_input), (weights.output, of_output)):
        torch.testing.assert_close(found.float(), factor.sqrt() / factor.sqrt().mean(), rtol=0.03, atol=0)
    assert weights.scale == pytest.approx(scale**0.5, rel=0.03)


def test_no_gradient_means_no_weight():
    state = {"a": torch.randn(2, 4), "b": torch.zeros(3, 2)}
    weights = pair_weights(state, {"a": torch.zeros(2, 4), "b": torch.zeros(3, 2)}, Pair("m", "a", "b"))
    assert weights.scale == 0.0
    assert torch.isfinite(weights.input).all()


def test_an_empty_set_and_labels_that_are_all_masked_are_refused():
    model = trained()
    adapter = trained_adapter(model)
    with pytest.raises(DataError, match="calibration set is empty"):
        adapter_fisher(model, adapter.parameters, [])
    masked = collate([{"input_ids": [1, 2, 3], "labels": [-100] * 3}], 0)
    with pytest.raises(NonFiniteError, match="calibration loss is nan"):
        adapter_fisher(model, adapter.parameters, [masked])
