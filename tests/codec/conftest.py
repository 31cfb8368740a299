"""Synthetic adapters for codec tests: LoRA-shaped deltas with clustered importance, small and deterministic."""

import pytest
import torch

SHAPES = {
    "layers.0.q.lora_A": (8, 96),
    "layers.0.q.lora_B": (64, 8),
    "layers.0.v.lora_A": (8, 96),
    "layers.0.v.lora_B": (32, 8),
    "layers.0.v.magnitude": (32,),
}


def make_update(shapes=SHAPES, seed=0, scale=1e-3):
    """(delta, fisher) with log-normal importance per matrix and per column, as LoRA updates have."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    delta, fisher = {}, {}
    for name, shape in shapes.items():
        columns = normal(shape[-1]).exp() if "lora_A" in name else normal(shape[0], *[1] * (len(shape) - 1)).exp()
        delta[name] = scale * normal(*shape) * float(normal(1).mul(0.5).exp())
        fisher[name] = (normal(*shape) * columns).square() * float(normal(1).exp()) * 1e-6
    return delta, fisher


@pytest.fixture
def update():
    """A small LoRA-like (delta, fisher)."""
    return make_update()
