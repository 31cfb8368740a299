"""Every model family: nothing dropped changes nothing, and what is dropped is exactly what a mask would hide."""

from __future__ import annotations

import copy

import pytest
import torch
from families import FAMILIES, left_padded, make_ids, make_model
from torch import Tensor

from fedfstq_hf.generation.attention import window_attention
from fedfstq_hf.generation.blocks import read_at
from fedfstq_hf.generation.probe import Probe
from fedfstq_hf.generation.reducer import TokenReducer
from fedfstq_hf.generation.scorers import QueryAttention, Rarity, Recency

LENGTH, NEW = 40, 8


def masked_tokens(model, ids: Tensor, kept: Tensor) -> Tensor:
    """Greedy tokens of the whole prompt with what is not kept masked out, without a cache."""
    mask = torch.zeros_like(ids).scatter(1, kept, 1)
    for _ in range(NEW):
        positions = torch.arange(ids.shape[1]).expand(ids.shape)
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    return ids


@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_everything_is_plain_generate(family):
    model, ids = make_model(family), make_ids(2, LENGTH)
    expected = model.generate(ids, max_new_tokens=NEW, do_sample=False)
    for scorer in (QueryAttention(), Recency()):
        reducer = TokenReducer(1.0, min_tokens=0, scorer=scorer)
        assert torch.equal(model.generate(ids, max_new_tokens=NEW, do_sample=False, custom_generate=reducer), expected)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_reduced_inputs_give_the_logits_of_masking(family):
    model, ids = make_model(family), make_ids(2, LENGTH)
    reducer = TokenReducer(0.5, min_tokens=0, scorer=Rarity(), model=model)
    reduced = reducer.reduce(ids)
    assert reduced["input_ids"].shape == (2, LENGTH // 2)
    kept = reduced["position_ids"]
    hidden = torch.zeros_like(ids).scatter(1, kept, 1)
    whole = model(input_ids=ids, attention_mask=hidden, position_ids=torch.arange(LENGTH).expand(2, -1)).logits
    at_kept = whole.gather(1, kept[..., None].expand(-1, -1, whole.shape[-1]))
    torch.testing.assert_close(model(**reduced).logits, at_kept, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_generating_on_a_shortened_prompt_is_generating_with_a_mask(family):
    model, ids = make_model(family), make_ids(2, LENGTH)
    kept = TokenReducer(0.5, min_tokens=0, scorer=Rarity(), model=model).reduce(ids)["position_ids"]
    expected = masked_tokens(model, ids, kept)
    # A probe that reads block 0 drops tokens before any of them met: the hooked path must agree with the plain one.
    probe = Probe(torch.randn(32, generator=torch.Generator().manual_seed(3)), layer=0)
    for scorer in (Rarity(), probe):
        reducer = TokenReducer(0.5, min_tokens=0, scorer=scorer)
        if scorer is probe:
            expected = masked_tokens(model, ids, reducer.kept(ids, torch.ones_like(ids), model).positions)
        result = model.generate(ids, max_new_tokens=NEW, do_sample=False, custom_generate=reducer)
        assert torch.equal(result, expected)
        assert not torch.equal(result, model.generate(ids, max_new_tokens=NEW, do_sample=False))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_window_attention_is_the_models_own(family):
    model = make_model(family)
    model.set_attn_implementation("eager")
    ids, mask = left_padded([24, 17])
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    whole = model(input_ids=ids, attention_mask=mask, position_ids=positions, output_attentions=True)
    for layer in (0, 2):
        found = window_attention(read_at(model, layer, ids, mask), 5)
        torch.testing.assert_close(found, whole.attentions[layer][:, :, -5:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_a_padded_batch_are_what_they_are_alone(family):
    model = make_model(family)
    lengths = [40, 31, 12]
    ids, mask = left_padded(lengths)
    for scorer in (QueryAttention(), Rarity()):
        reducer = TokenReducer(0.5, min_tokens=0, scorer=scorer)
        both = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, custom_generate=reducer)
        assert both.shape == (3, 40 + NEW)
        for row, length in enumerate(lengths):
            alone = model.generate(
                ids[row : row + 1, -length:], max_new_tokens=NEW, do_sample=False, custom_generate=reducer
            )
            assert torch.equal(both[row, -NEW:], alone[0, -NEW:])


@torch.no_grad()
def test_early_layers_run_once_and_later_ones_see_kept_tokens_only():
    model, ids = make_model("llama"), make_ids(1, LENGTH)
    reducer = TokenReducer(0.5, min_tokens=0, scorer=QueryAttention(layer=2))
    lengths: list[int] = []
    handles = [
        block.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
        for block in model.model.layers
    ]
    result = model.generate(
        ids,
        max_new_tokens=2,
        do_sample=False,
        custom_generate=reducer,
        return_dict_in_generate=True,
        output_logits=True,
    )
    for handle in handles:
        handle.remove()
    assert lengths[:4] == [40, 40, 40, 20]  # this hook of block 2 comes before the one that cuts
    assert lengths[4:] == [1] * 4
    assert [layer.keys.shape[-2] for layer in result.past_key_values.layers] == [21] * 4

    kept = reducer.kept(ids, torch.ones_like(ids), model).positions
    early = model(ids, output_hidden_states=True).hidden_states[2]
    rest = copy.deepcopy(model)
    rest.model.layers = rest.model.layers[2:]
    rest.config.num_hidden_layers = 2
    logits = rest(
        inputs_embeds=early[:, kept[0]], position_ids=kept, use_cache=False, attention_mask=kept * 0 + 1
    ).logits
    torch.testing.assert_close(result.logits[0], logits[:, -1], rtol=1e-4, atol=1e-4)
    assert not any(block._forward_pre_hooks for block in model.model.layers)


def test_gpt2_runs_the_first_layers_again():
    """Its decoder gives its result the shape of its input, so nothing can be dropped on the way."""
    model, ids = make_model("gpt2"), make_ids(1, LENGTH)
    reducer = TokenReducer(0.5, min_tokens=0, model=model)
    expected = model.generate(**reducer.reduce(ids), max_new_tokens=NEW, do_sample=False)[:, -NEW:]
    found = model.generate(ids, max_new_tokens=NEW, do_sample=False, custom_generate=reducer)[:, -NEW:]
    assert torch.equal(found, expected)
