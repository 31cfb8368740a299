"""Level fitting, against values worked out by hand."""

import numpy as np
import pytest

from fedfstq_hf.codec.quantization import OCTAVES, assign, fit_levels, grid, nearest


def fit(magnitude, weight, group, num_groups, levels):
    return fit_levels(np.array(magnitude, float), np.array(weight, float), np.array(group), num_groups, levels)


@pytest.mark.parametrize("steps", [2, 4, 8])
def test_grid_is_geometric_and_holds_powers_of_two(steps):
    points = grid(steps)
    assert points.dtype == np.float32
    assert points.size == OCTAVES * steps
    assert np.isfinite(points).all()
    assert np.allclose(points[1:] / points[:-1], 2 ** (1 / steps), rtol=1e-6)
    assert {1.0, 0.5, 2.0**-80} <= set(points.tolist())


def test_nearest_is_nearest_and_clips():
    points = grid(4).astype(float)
    for x in (1.0, 1.08, 1.1, 1.9, 1e-5):
        assert abs(points[nearest(np.array([x]), 4)[0]] - x) == np.abs(points - x).min()
    assert nearest(np.array([0.0, 1e300]), 4).tolist() == [0, points.size - 1]


def test_one_level_is_the_weighted_mean():
    # group 0: (1*3 + 5*1) / 4 = 2; group 1 is empty; group 2: 0.5
    levels, number = fit([1.0, 5.0, 0.5], [3.0, 1.0, 7.0], [0, 0, 2], 3, 1)
    assert levels[0, 0] == 2.0
    assert levels[2, 0] == 0.5
    assert number.tolist() == [0, 0, 0]


def test_two_levels_find_two_clusters():
    levels, number = fit([1.0, 1.0, 4.0, 4.0], [1, 9, 1, 1], [0, 0, 0, 0], 1, 2)
    assert levels.tolist() == [[1.0, 4.0]]
    assert number.tolist() == [0, 0, 1, 1]


def test_weights_pull_the_levels():
    # one cell {1, 3} weighted 3:1 has mean 1.5, which the grid rounds to 2^(5/8)
    levels, _ = fit([1.0, 3.0, 100.0], [3.0, 1.0, 1.0], [0, 0, 0], 1, 2)
    assert levels[0, 0] == pytest.approx(2 ** (5 / 8), rel=1e-6)
    assert levels[0, 1] == pytest.approx(100, rel=0.05)


def test_more_levels_never_fit_worse():
    rng = np.random.default_rng(0)
    magnitude, weight, group = np.abs(rng.standard_normal(2000)), rng.random(2000), rng.integers(0, 5, 2000)
    errors = []
    for count in (1, 2, 4):
        levels, number = fit_levels(magnitude, weight, group, 5, count)
        errors.append((weight * (magnitude - levels[group, number]) ** 2).sum())
    # halving the cells of a half-normal divides the error by about 3.5
    assert errors[0] > 2.5 * errors[1] > 2.5 * 2.5 * errors[2]


def test_assign_gives_ties_to_the_lower_level():
    levels = np.array([[1.0, 2.0, 4.0, 8.0]])
    magnitude = np.array([0.1, 1.5, 1.6, 3.0, 6.1, 99.0])
    assert assign(magnitude, levels, np.zeros(6, int)).tolist() == [0, 0, 1, 1, 3, 3]
