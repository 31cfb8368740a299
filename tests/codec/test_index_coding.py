"""Support coding: the layout is a bijection, round trips are exact, sizes meet the bounds they claim."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfstq_hf.codec import Schema
from fedfstq_hf.codec.coding import index_coding
from fedfstq_hf.codec.coding.entropy import Reader, Writer
from fedfstq_hf.codec.coding.index_coding import Layout

ODD_SHAPES = {
    "a": (16, 40), "b": (40, 16), "c": (64, 100), "d": (7, 7), "e": (13,), "f": (1, 48), "g": (48, 1), "h": (),
    "i": (4, 3, 3, 3), "j": (0, 5), "k": (37, 41), "l": (256, 300),
}  # fmt: skip


def layout_of(shapes):
    return Layout.of(Schema.from_state_dict({name: torch.zeros(shape) for name, shape in shapes.items()}))


def code(layout, indices):
    writer = Writer()
    index_coding.write(writer, layout, indices, index_coding.plan(layout, layout.columns_of(indices)[0]))
    return writer.finish()


def decode(layout, data):
    reader = Reader(data)
    places = index_coding.read(reader, layout)
    reader.finish()
    return places.indices()


def test_layout_is_a_bijection_onto_small_columns():
    layout = layout_of(ODD_SHAPES)
    everything = np.arange(layout.num_params)
    columns, rows = layout.columns_of(everything)
    assert np.array_equal(layout.indices_of(columns, rows), everything)
    assert np.array_equal(np.bincount(columns), layout.height_of_column)
    assert (rows < layout.height_of_column[columns]).all()
    assert layout.heights.max() <= 32


def test_columns_run_along_the_rank():
    layout = layout_of({"A": (2, 3), "B": (3, 2)})
    # A is rows (rank) by features: coordinates 0 and 3 share feature 0; in B, 6 and 7 do
    assert layout.columns_of(np.arange(12))[0].tolist() == [0, 1, 2, 0, 1, 2, 3, 3, 4, 4, 5, 5]
    assert layout.columns_of(np.arange(12))[1].tolist() == [0, 0, 0, 1, 1, 1, 0, 1, 0, 1, 0, 1]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_round_trip(data):
    shapes = data.draw(
        st.dictionaries(
            st.text("abc", min_size=1, max_size=4), st.lists(st.integers(0, 40), max_size=3), min_size=1, max_size=5
        )
    )
    layout = layout_of(shapes)
    density = data.draw(st.sampled_from([0.0, 0.01, 0.3, 0.9, 1.0]))
    seed = data.draw(st.integers(0, 2**32 - 1))
    indices = np.flatnonzero(np.random.default_rng(seed).random(layout.num_params) < density)
    assert np.array_equal(decode(layout, code(layout, indices)), indices)


@pytest.mark.parametrize("p", [0.002, 0.01, 0.05, 0.3])
def test_independent_coordinates_cost_their_entropy(p):
    layout = layout_of(
        {f"{i}.{side}": shape for i in range(8) for side, shape in (("A", (16, 1024)), ("B", (1024, 16)))}
    )
    mask = np.random.default_rng(1).random(layout.num_params) < p
    share = mask.mean()
    ideal = -mask.size * (share * math.log2(share) + (1 - share) * math.log2(1 - share)) / 8
    assert len(code(layout, np.flatnonzero(mask))) <= 1.01 * ideal + 24


def test_clustered_coordinates_cost_less_than_independent_ones():
    layout = layout_of({f"{i}": (16, 1024) for i in range(8)})
    rng = np.random.default_rng(2)
    share = np.repeat(rng.gamma(0.05, 0.4, (8, 1, 1024)), 16, axis=1).reshape(-1)
    mask = rng.random(share.size) < np.minimum(share, 0.9)
    p = mask.mean()
    independent = -mask.size * (p * math.log2(p) + (1 - p) * math.log2(1 - p)) / 8
    assert len(code(layout, np.flatnonzero(mask))) < 0.8 * independent


def test_estimate_is_close_to_the_exact_size():
    layout = layout_of({f"{i}": (16, 512) for i in range(12)})
    rng = np.random.default_rng(3)
    for p in (0.001, 0.02, 0.2):
        indices = np.flatnonzero(rng.random(layout.num_params) < p * np.repeat(rng.gamma(1, 1, 12), 16 * 512))
        bits = index_coding.plan(layout, layout.columns_of(indices)[0]).bits
        assert bits == pytest.approx(8 * len(code(layout, indices)), rel=0.03, abs=48)
