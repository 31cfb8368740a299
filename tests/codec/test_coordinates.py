"""Coordinates: what is set comes out where it was, in whichever form is smaller."""

import numpy as np
import pytest

from fedfstq_hf.codec.codec import RUN, Coordinates

OFFSETS = np.array([0, 5, 5, 5 + 2 * RUN + 3, 5 + 2 * RUN + 20])


@pytest.mark.parametrize("share", [0.0, 0.01, 0.33, 0.34, 0.9, 1.0])
def test_values_lie_where_the_mask_is_set(share):
    rng = np.random.default_rng(0)
    mask = rng.random(OFFSETS[-1]) < share
    places = Coordinates(mask, OFFSETS)
    values = rng.standard_normal(places.count).astype(np.float32)
    room = places.room()
    room[: places.count] = values
    update = places.update(room)
    expected = np.zeros(mask.size, dtype=np.float32)
    expected[mask] = values
    assert np.array_equal(update.to_dense().numpy(), expected)
    assert (update.indices is None) == (3 * values.size > mask.size)
    assert np.array_equal(places.indices(), np.flatnonzero(mask))


def test_parts_keep_to_one_tensor_and_leave_out_empty_ones():
    mask = np.zeros(OFFSETS[-1], dtype=np.bool_)
    mask[[4, 5, 5 + RUN, OFFSETS[-2]]] = True
    places = Coordinates(mask, OFFSETS)
    assert places.used.tolist() == [True, False, True, True]
    assert [(p.tensor, p.start, p.first, p.last) for p in places.parts] == [
        (0, 0, 0, 1), (2, 5, 1, 2), (2, 5 + RUN, 2, 3), (3, OFFSETS[-2], 3, 4),
    ]  # fmt: skip
