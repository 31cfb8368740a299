"""The grid of magnitudes, against values worked out by hand."""

import numpy as np

from fedfstq_hf.codec.fstq import MAGNITUDE_STEPS, OCTAVES, magnitude_grid, nearest_magnitude


def test_the_grid_is_geometric_and_holds_powers_of_two():
    points = magnitude_grid()
    assert points.dtype == np.float32
    assert points.size == OCTAVES * MAGNITUDE_STEPS
    assert np.isfinite(points).all()
    assert np.allclose(points[1:] / points[:-1], 2 ** (1 / MAGNITUDE_STEPS), rtol=1e-6)
    assert {1.0, 0.5, 2.0**-80} <= set(points.tolist())


def test_nearest_is_nearest_and_clips():
    points = magnitude_grid().astype(float)
    for x in (1.0, 1.08, 1.1, 1.9, 1e-5):
        assert abs(points[nearest_magnitude(np.array([x]))[0]] - x) == np.abs(points - x).min()
    assert nearest_magnitude(np.array([0.0, 1e300])).tolist() == [0, points.size - 1]
