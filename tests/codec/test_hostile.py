"""Streams that are well formed but for one symbol that the format does not allow. All other attacks: tests/attacks."""

import numpy as np
import pytest
import torch

from fedfstq_hf.codec import Schema, get_codec, support
from fedfstq_hf.codec.entropy import Adaptive, Writer, uniform
from fedfstq_hf.codec.support import Layout
from fedfstq_hf.errors import MessageError

ONE = Schema.from_state_dict({"a": torch.zeros(1, 1)})


@pytest.mark.parametrize("kind", [0, 10, 15])
def test_fstq_unknown_kind(kind):
    writer = Writer()
    writer.put([kind], uniform(16))
    with pytest.raises(MessageError, match=f"kind {kind};"):
        get_codec("fstq").decode(writer.finish(tail=[1] * 64), ONE)


def test_more_components_than_a_tensor_can_have_are_refused():
    writer = Writer()
    writer.put([5], uniform(16))
    writer.put_adaptive([2], Adaptive(16))
    with pytest.raises(MessageError, match=r"shape \(1, 1\) 2 components; expected at most 1"):
        get_codec("fstq").decode(writer.finish(tail=[1] * 64), ONE)


def test_levels_beyond_the_grid_are_refused():
    layout, index = Layout.of(ONE), np.zeros(1, dtype=np.int64)
    writer = Writer()
    writer.put([2], uniform(16))
    support.write(writer, layout, index, support.plan(layout, index))
    writer.put_adaptive([1000], Adaptive(1024))
    writer.put_adaptive([1000], Adaptive(1024))
    writer.put([1, 1], uniform(64))
    with pytest.raises(MessageError, match="level 2000"):
        get_codec("fstq").decode(writer.finish(tail=[0]), ONE)
