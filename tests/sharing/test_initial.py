"""PEFT's seeded start, drawn again: the same bits as PEFT's own, for every configuration that is let through."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import make_tiny_model
from transformers import set_seed

from fedfstq_hf.errors import AdapterMismatchError
from fedfstq_hf.sharing.coding import initial_state, state_sha256
from fedfstq_hf.sharing.trained import trained_adapter


def start(seed, **lora):
    """A fresh adapter, its matrices' shapes and what `initial_state` makes of the seed."""
    base = make_tiny_model().unload()
    set_seed(seed)
    settings = {"r": 4, "target_modules": "all-linear"} | lora
    adapter = trained_adapter(get_peft_model(base, LoraConfig(**settings)))
    shapes = {name: tuple(adapter.parameters[name].shape) for name in sorted(adapter.paired())}
    return adapter, shapes


@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"r": 7, "use_rslora": True},
        {"rank_pattern": {"q_proj": 2, "down_proj": 5}},
        {"lora_bias": True},
        {"use_dora": True},
        {"target_modules": ["down_proj", "q_proj"]},
    ],
)
def test_it_is_peft_s_start_bit_for_bit(lora):
    adapter, shapes = start(7, **lora)
    drawn = initial_state(shapes, adapter.pairs, adapter.config, 7)
    state = adapter.state()
    assert all(torch.equal(drawn[name], state[name]) for name in shapes)
    other = initial_state(shapes, adapter.pairs, adapter.config, 8)
    assert state_sha256(other) != state_sha256(drawn)


def test_without_a_seed_it_is_zeros_and_the_global_generator_is_left_alone():
    adapter, shapes = start(7)
    assert not any(tensor.any() for tensor in initial_state(shapes, adapter.pairs, adapter.config, None).values())
    before = torch.get_rng_state()
    initial_state(shapes, adapter.pairs, adapter.config, 7)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("lora", "match"),
    [
        ({"init_lora_weights": "gaussian"}, "init_lora_weights is 'gaussian'"),
        ({"init_lora_weights": False}, "init_lora_weights is False"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "lora_embedding_A"),
    ],
)
def test_starts_that_a_seed_does_not_give_are_refused(lora, match):
    adapter, shapes = start(7, **lora)
    with pytest.raises(AdapterMismatchError, match=f"{match}.*Leave init_seed out"):
        initial_state(shapes, adapter.pairs, adapter.config, 7)
