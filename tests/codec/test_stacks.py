"""Reading an update stack by stack: orientation, scale, samples, weights."""

import contextlib

import pytest
import torch

from fedfstq_hf.codec import Schema
from fedfstq_hf.codec.stacks import Source, one_thread, sides, stacks_of, thin_for
from fedfstq_hf.errors import AdapterMismatchError, ConfigError, NonFiniteError

STATE = {
    "a": torch.arange(6.0).view(2, 3),
    "b": torch.arange(6.0).view(3, 2),
    "c": torch.arange(6.0).view(2, 3) + 1,
    "d": torch.arange(4.0),
    "e": torch.zeros(0, 5),
}
SCHEMA = Schema.from_state_dict(STATE)


def test_stacks_hold_every_tensor_once_by_shape_and_orientation():
    stacks = stacks_of(SCHEMA)
    assert [(s.tensors, s.r, s.f, s.tall) for s in stacks] == [
        ((0, 2), 2, 3, False),
        ((1,), 2, 3, True),
        ((3,), 1, 4, False),
    ]
    many = Schema.from_state_dict({str(i): torch.zeros(16, 4096) for i in range(10)})
    assert [len(s.tensors) for s in stacks_of(many)] == [4, 4, 2]
    assert [len(s.tensors) for s in stacks_of(many, thin=100)] == [10]


def test_both_orientations_are_read_as_small_by_large_side():
    source = Source(SCHEMA, STATE, None, 1.0)
    assert source.exponent == 3  # the largest is 6 = 0.75 * 2^3
    flat, tall, vector = (source.delta(stack) * 8 for stack in stacks_of(SCHEMA))
    assert flat.tolist() == [STATE["a"].tolist(), STATE["c"].tolist()]
    assert tall.tolist() == [[[0, 2, 4], [1, 3, 5]]]
    assert vector.tolist() == [[[0, 1, 2, 3]]]


def test_a_sample_takes_every_so_many_th_feature():
    state = {"a": torch.arange(512.0).view(2, 256), "b": torch.arange(512.0).view(256, 2)}
    assert [thin_for(f, 10) for f in (100, 512, 2048, 51200)] == [1, 1, 4, 10]
    schema = Schema.from_state_dict(state)
    flat, tall = (Source(schema, state, None, 1.0).delta(stack, 4) * 512 for stack in stacks_of(schema))
    assert torch.equal(flat[0], state["a"][:, ::4])
    assert torch.equal(tall[0], state["b"][::4].T)


@pytest.mark.parametrize("power", [0.25, 0.5, 0.75, 1.0])
def test_weights_follow_the_power_and_never_vanish(power):
    state = {"a": torch.ones(2, 3)}
    fisher = {"a": torch.tensor([[1.0, 0.0, 0.25], [0.5, 0.0625, 0.0]])}
    source = Source(Schema.from_state_dict(state), state, fisher, power)
    weight = source.weight(stacks_of(source.schema)[0])[0]
    expected = (fisher["a"] / 2) ** power
    assert torch.allclose(weight, expected, atol=2e-3 * float(expected.mean()))
    assert (weight > 0).all()


def test_no_fisher_and_an_all_zero_one_weigh_alike():
    zeros = {name: torch.zeros_like(value) for name, value in STATE.items()}
    for stack in stacks_of(SCHEMA):
        assert (Source(SCHEMA, STATE, zeros, 0.75).weight(stack) == 1).all()
        assert (Source(SCHEMA, STATE, None, 0.75).weight(stack) == 1).all()


def test_values_at_the_ends_of_float32_are_scaled_without_loss():
    for magnitude in (1e-38, 3e38):
        state = {"a": torch.full((2, 3), magnitude)}
        scaled = Source(Schema.from_state_dict(state), state, None, 1.0).delta(
            stacks_of(Schema.from_state_dict(state))[0]
        )
        assert ((scaled >= 0.5) & (scaled < 1)).all()


def test_bad_input_is_refused():
    good = {"a": torch.ones(2, 3)}
    schema = Schema.from_state_dict(good)
    with pytest.raises(NonFiniteError, match="'a'"):
        Source(schema, {"a": torch.full((2, 3), float("nan"))}, None, 1.0)
    with pytest.raises(ConfigError, match="negative"):
        Source(schema, good, {"a": -torch.ones(2, 3)}, 1.0)
    with pytest.raises(AdapterMismatchError, match="shape"):
        Source(schema, good, {"a": torch.ones(3, 2)}, 1.0)


def test_sides():
    assert [sides(spec) for spec in SCHEMA.tensors] == [(2, 3), (2, 3), (2, 3), (1, 4), (1, 0)]


def test_one_thread_undoes_itself():
    before = torch.get_num_threads()
    seen = []
    with contextlib.suppress(ValueError), one_thread():
        seen.append(torch.get_num_threads())
        raise ValueError
    assert (seen, torch.get_num_threads()) == ([1], before)
