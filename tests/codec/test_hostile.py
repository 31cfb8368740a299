"""Streams that are well formed but for one symbol that the format does not allow. All other attacks: tests/attacks."""

import numpy as np
import pytest
import torch

from fedfstq_hf.codec import Schema, get_codec, support
from fedfstq_hf.codec.entropy import Adaptive, Writer, uniform
from fedfstq_hf.codec.support import Layout
from fedfstq_hf.errors import MessageError

ONE = Schema.from_state_dict({"a": torch.zeros(1, 1)})


def test_fstq_unknown_kind():
    writer = Writer()
    writer.put([3], uniform(4))
    with pytest.raises(MessageError, match="kind 3"):
        get_codec("fstq").decode(writer.finish(tail=[1] * 64), ONE)


def test_levels_beyond_the_grid_are_refused():
    layout, index = Layout.of(ONE), np.zeros(1, dtype=np.int64)
    writer = Writer()
    writer.put([1], uniform(4))
    support.write(writer, layout, index, support.plan(layout, index))
    writer.put_adaptive([1000], Adaptive(1024))
    writer.put_adaptive([1000], Adaptive(1024))
    writer.put([1, 1], uniform(64))
    with pytest.raises(MessageError, match="level 2000"):
        get_codec("fstq").decode(writer.finish(tail=[0]), ONE)
