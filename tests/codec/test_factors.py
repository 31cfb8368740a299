"""Sparse sign factors: what is fitted, how it is priced, and that coding and adding up are exact."""

import math

import numpy as np
import pytest
import torch

from fedfstq_hf.codec import Schema
from fedfstq_hf.codec import components as parts
from fedfstq_hf.codec.components import Component
from fedfstq_hf.codec.entropy import Reader, Writer
from fedfstq_hf.codec.factors import fit
from fedfstq_hf.codec.stacks import Source, Stack
from fedfstq_hf.codec.tradeoff import Sample


def planted(seed=0, f=200):
    generator = torch.Generator().manual_seed(seed)
    s = torch.tensor([1.0, -0.5, 0.25, 2.0]) / 4
    t = torch.where(torch.rand(f, generator=generator) < 0.4, torch.randn(f, generator=generator).sign(), 0.0)
    return s, t


def test_a_planted_factor_is_found_whole_and_exactly():
    s, t = planted()
    rest = (s[:, None] * t)[None].clone()
    (layer,) = fit(Stack((0,), 4, 200, False), rest, torch.ones_like(rest), 1e-6, exponent=0)
    assert torch.equal(layer.s[0][:, None] * layer.t[0], s[:, None] * t)
    assert not rest.any()
    assert float(layer.gain) == pytest.approx(float((s[:, None] * t).square().sum()), rel=1e-5)


def test_features_that_weigh_little_are_left_out():
    s, _ = planted()
    t = torch.ones(200)
    weight = torch.ones(1, 4, 200)
    weight[:, :, 100:] = 1e-6
    rest = (s[:, None] * t)[None].clone()
    (layer,) = fit(Stack((0,), 4, 200, False), rest, weight, 0.01, exponent=0)
    assert layer.t[0, :100].abs().all()
    assert not layer.t[0, 100:].any()


def test_nothing_is_worth_a_high_price():
    s, t = planted()
    rest = (s[:, None] * t)[None].clone()
    assert fit(Stack((0,), 4, 200, False), rest, torch.ones_like(rest), 1e3, exponent=0) == []
    assert torch.equal(rest[0], s[:, None] * t)


def test_what_is_left_is_the_update_less_its_components():
    generator = torch.Generator().manual_seed(1)
    update, weight = torch.randn(3, 4, 50, generator=generator), torch.rand(3, 4, 50, generator=generator) + 0.1
    rest = update.clone()
    layers = fit(Stack((0, 1, 2), 4, 50, False), rest, weight, 0.3, exponent=0)
    assert len(layers) >= 2
    total = torch.zeros_like(update)
    for layer in layers:
        total[layer.members] += layer.s[:, :, None] * layer.t[:, None]
        assert (layer.gain > 0.3 * layer.bits).all()
    assert torch.allclose(update - total, rest, atol=1e-5)
    saved = float((weight * (update.square() - rest.square())).sum())
    assert saved == pytest.approx(sum(float(layer.gain.sum()) for layer in layers), rel=1e-3)


def component(tensor, r, f, density, seed):
    rng = np.random.default_rng(seed)
    t = np.where(rng.random(f) < density, rng.choice([-1, 1], f), 0).astype(np.int8)
    return Component(tensor, rng.integers(150, 160, r), rng.random(r) < 0.5, t)


def test_components_survive_coding_and_cost_their_entropy():
    schema = Schema.from_state_dict({"a": torch.zeros(4, 3000), "b": torch.zeros(2000, 4), "c": torch.zeros(50)})
    found = [component(0, 4, 3000, 0.3, 0), component(0, 4, 3000, 0.9, 1), component(1, 4, 2000, 0.02, 2)]
    writer = Writer()
    tail = parts.write(writer, schema, found)
    data = writer.finish(tail=tail)
    reader = Reader(data)
    back = parts.read(reader, schema)
    back = parts.signed(back, reader.finish(tail=parts.num_signs(back)))
    for one, two in zip(found, back, strict=True):
        assert one.tensor == two.tensor
        for field in ("points", "s_negative", "t"):
            assert np.array_equal(getattr(one, field), getattr(two, field))
    bits = 0.0
    for c in found:
        p = np.count_nonzero(c.t) / c.t.size
        bits += c.t.size * (p - p * math.log2(p) - (1 - p) * math.log2(1 - p)) + 4 * (1 + math.log2(11))
    assert 8 * len(data) <= 1.01 * bits + 160  # tables and counts


def test_they_add_up_in_place():
    schema = Schema.from_state_dict({"a": torch.zeros(2, 3), "b": torch.zeros(3, 2)})
    one = 160  # grid point of magnitude 1: 2 steps per octave from 2^-80
    t = np.array([1, 0, -1], dtype=np.int8)
    first = Component(0, np.array([one, one + 2]), np.array([False, True]), t)
    second = Component(1, np.array([one - 2, one]), np.array([False, False]), t)
    total = parts.assemble(schema, [first, first, second])
    assert total.view(2, 6).tolist() == [[2, 0, -2, -4, 0, 4], [0.5, 1, 0, 0, -0.5, -1]]


@pytest.mark.parametrize("coordinates", [True, False])
def test_the_price_fills_the_budget(coordinates):
    generator = torch.Generator().manual_seed(3)
    state = {str(i): torch.randn(8, 512, generator=generator) for i in range(6)}
    fisher = {name: torch.randn(8, 512, generator=generator).pow(4) for name in state}
    source = Source(Schema.from_state_dict(state), state, fisher, 1.0)
    sample = Sample(source)
    for limit in (4000.0, 12000.0):
        price = sample.price(limit, coordinates=coordinates)
        assert sample._bits(price, coordinates) == pytest.approx(limit, rel=0.1)
    assert sample.price(12000.0, coordinates=coordinates) < sample.price(4000.0, coordinates=coordinates)


def test_a_sample_speaks_for_the_whole(monkeypatch):
    from fedfstq_hf.codec import tradeoff

    generator = torch.Generator().manual_seed(4)
    state = {str(i): torch.randn(8, 2048, generator=generator) for i in range(16)}
    fisher = {name: torch.randn(8, 2048, generator=generator).pow(4) for name in state}
    source = Source(Schema.from_state_dict(state), state, fisher, 1.0)
    monkeypatch.setattr(tradeoff, "_LEAST", 1 << 18)
    whole = Sample(source)
    assert sum(part.delta.numel() for part in whole._parts) == source.schema.num_params
    monkeypatch.setattr(tradeoff, "_LEAST", 1 << 14)
    sample = Sample(source)
    assert sum(part.delta.numel() for part in sample._parts) == 1 << 14
    assert sum(part.copies * part.delta.numel() for part in sample._parts) == source.schema.num_params
    price = whole.price(80000.0, coordinates=True)
    assert sample._bits(price, True) == pytest.approx(80000.0, rel=0.15)
    assert sample.importance(0.05, None) == pytest.approx(whole.importance(0.05, None), rel=0.1)
