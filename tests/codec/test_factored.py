"""factored: exact outer products are recovered, weights steer the fit, components go out in order."""

import pytest
import torch

from fedfstq_hf.codec import Schema, get_codec


def outer(s, t):
    return torch.tensor(s)[:, None] * torch.tensor(t)[None, :]


@pytest.mark.parametrize("transpose", [False, True])
def test_an_outer_product_on_the_grid_is_exact(transpose):
    matrix = outer([1.0, -0.5, 0.25], [1.0, -1.0, 1.0, 1.0, -1.0])
    delta = {"a": matrix.t().contiguous() if transpose else matrix}
    update = get_codec("factored").encode(delta).reconstruction
    assert torch.equal(update.to_dense(), Schema.from_state_dict(delta).flatten(delta))


def test_two_components_recover_a_sum_of_two():
    signs = [1.0, -1.0, 1.0, 1.0, -1.0, -1.0, 1.0, -1.0], [1.0, 1.0, -1.0, 1.0, 1.0, -1.0, -1.0, -1.0]
    matrix = outer([4.0, 0.0, 2.0, 0.0], signs[0]) + outer([0.0, 1.0, 0.0, 1.0], signs[1])
    delta = {"a": matrix}
    errors = [
        float(
            (
                get_codec("factored", components=n).encode(delta, max_bytes=100).reconstruction.to_dense().view(4, 8)
                - matrix
            )
            .square()
            .sum()
            / matrix.square().sum()
        )
        for n in (1, 2)
    ]
    assert errors[0] == pytest.approx(16 / 176, abs=0.01)
    assert errors[1] < 0.005


def test_the_fisher_decides_which_pattern_is_sent():
    # two halves of rows want opposite signs; the weighted half wins
    t = [1.0, -1.0, 1.0, -1.0, 1.0, 1.0]
    u = [1.0, 1.0, -1.0, -1.0, 1.0, -1.0]
    delta = {"a": outer([1.0, 1.0, 0.0, 0.0], t) + outer([0.0, 0.0, 1.0, 1.0], u)}
    for rows, pattern in ((slice(0, 2), t), (slice(2, 4), u)):
        weight = torch.full((4, 6), 1e-3)
        weight[rows] = 1.0
        sent = get_codec("factored", components=1).encode(delta, {"a": weight}).reconstruction.to_dense().view(4, 6)
        assert torch.equal(sent[rows], torch.tensor([pattern, pattern]))


def test_the_budget_goes_to_the_matrices_with_large_gradients():
    generator = torch.Generator().manual_seed(0)
    delta = {name: torch.randn(8, 64, generator=generator) for name in "abc"}
    fisher = {"a": torch.full((8, 64), 1e-4), "b": torch.ones(8, 64), "c": torch.full((8, 64), 1e-4)}
    update = get_codec("factored", components=1).encode(delta, fisher, max_bytes=20).reconstruction
    assert update.indices.tolist() == list(range(512, 1024))


def test_vectors_become_signs_times_one_magnitude():
    update = get_codec("factored").encode({"v": torch.tensor([1.0, -1.0, 2.0, -4.0])}).reconstruction
    assert update.values.tolist() == [2.0, -2.0, 2.0, -2.0]


def test_without_a_budget_every_matrix_gets_one_component():
    delta = {"a": torch.randn(4, 32), "b": torch.zeros(4, 32), "c": torch.randn(32, 4)}
    update = get_codec("factored").encode(delta).reconstruction
    assert int(update.to_dense().count_nonzero()) == 256
    assert (update.to_dense()[128:256] == 0).all()
