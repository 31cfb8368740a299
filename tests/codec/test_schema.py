"""Schema: coordinate order, fingerprint, and refusal of anything that is not the same adapter."""

import hashlib

import pytest
import torch

from fedfstq_hf.codec import Schema
from fedfstq_hf.errors import AdapterMismatchError


def state():
    return {"b": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "a": torch.tensor([5.0, 6.0, 7.0])}


def test_names_are_sorted_and_offsets_follow():
    schema = Schema.from_state_dict(state())
    assert [(s.name, s.shape, s.dtype, s.offset, s.size) for s in schema.tensors] == [
        ("a", (3,), "float32", 0, 3),
        ("b", (2, 2), "float32", 3, 4),
    ]
    assert schema.num_params == 7
    assert schema.flatten(state()).tolist() == [5, 6, 7, 1, 2, 3, 4]


def test_fingerprint_is_sha256_of_the_canonical_json():
    text = b'[["a",[3],"float32"],["b",[2,2],"float32"]]'
    assert Schema.from_state_dict(state()).fingerprint == hashlib.sha256(text).hexdigest()


def test_fingerprint_depends_on_dtype_and_shape_but_not_on_values():
    base = Schema.from_state_dict(state()).fingerprint
    assert Schema.from_state_dict({k: v * 2 for k, v in state().items()}).fingerprint == base
    assert Schema.from_state_dict({k: v.half() for k, v in state().items()}).fingerprint != base
    assert Schema.from_state_dict({k: v.reshape(-1) for k, v in state().items()}).fingerprint != base


def test_unflatten_gives_views_in_shape():
    schema = Schema.from_state_dict(state())
    vector = schema.flatten(state())
    views = schema.unflatten(vector)
    assert torch.equal(views["b"], state()["b"])
    views["b"][1, 1] = 9.0
    assert vector[6] == 9.0


def test_bfloat16_values_flatten_exactly():
    half = {"a": torch.tensor([0.1, 0.2]).bfloat16()}
    assert torch.equal(Schema.from_state_dict(half).flatten(half), half["a"].float())


@pytest.mark.parametrize(
    "wrong",
    [
        {"a": torch.zeros(3)},
        {**state(), "c": torch.zeros(1)},
        {**state(), "a": torch.zeros(4)},
    ],
)
def test_other_adapters_are_refused(wrong):
    with pytest.raises(AdapterMismatchError):
        Schema.from_state_dict(state()).flatten(wrong)


def test_wrong_vector_length_is_refused():
    with pytest.raises(AdapterMismatchError, match=r"\(8,\).*\(7,\)"):
        Schema.from_state_dict(state()).unflatten(torch.zeros(8))


@pytest.mark.parametrize("bad", [{}, {"a": torch.zeros(2, dtype=torch.int64)}])
def test_empty_and_integer_adapters_are_refused(bad):
    with pytest.raises(AdapterMismatchError):
        Schema.from_state_dict(bad)
