"""The file for an adapter's repo: works by name, alone, and agrees with the package."""

from __future__ import annotations

import ast
import sys
from threading import Thread

import pytest
import torch
from families import left_padded, make_ids, make_model
from transformers import DynamicCache, TextIteratorStreamer

from fedfstq_hf.demo import load_tokenizer
from fedfstq_hf.generation.published import HUB_PATH, custom_generate_source
from fedfstq_hf.generation.reducer import TokenReducer

NEW = 6


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    (folder / HUB_PATH).parent.mkdir()
    (folder / HUB_PATH).write_text(custom_generate_source(), encoding="utf-8")
    return {"custom_generate": str(folder), "trust_remote_code": True}


def test_it_imports_torch_transformers_and_the_standard_library_only():
    names = set()
    for node in ast.walk(ast.parse(custom_generate_source())):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names.add(node.module.split(".")[0])
    assert names - set(sys.stdlib_module_names) == {"torch", "transformers"}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma"])
@pytest.mark.parametrize("way", [{"do_sample": False}, {"num_beams": 2}])
def test_it_does_what_the_package_does(repo, family, way):
    model = make_model(family)
    ids, mask = left_padded([40, 29])
    options = {"attention_mask": mask, "max_new_tokens": NEW, **way}
    expected = model.generate(ids, custom_generate=TokenReducer(0.4, min_tokens=0), **options)
    assert torch.equal(model.generate(ids, keep_ratio=0.4, min_tokens=0, **repo, **options), expected)
    assert not any(block._forward_pre_hooks for block in model.model.layers)


def test_nothing_dropped_is_plain_generate(repo):
    model, ids = make_model(), make_ids(1, 40)
    expected = model.generate(ids, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=NEW, do_sample=False, **repo), expected)  # short
    kept = model.generate(ids, max_new_tokens=NEW, do_sample=False, keep_ratio=1.0, min_tokens=0, **repo)
    assert torch.equal(kept, expected)


def test_streamer(repo):
    model, ids, tokenizer = make_model(), make_ids(1, 40), load_tokenizer()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=20)
    options = {"max_new_tokens": NEW, "do_sample": False, "min_tokens": 0, **repo}
    thread = Thread(target=model.generate, kwargs={"inputs": ids, "streamer": streamer, **options})
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == tokenizer.decode(model.generate(ids, **options)[0, 40:])


def test_cut_cache_is_not_handed_out(repo):
    model, ids = make_model(), make_ids(1, 40)
    result = model.generate(ids, max_new_tokens=2, min_tokens=0, return_dict_in_generate=True, **repo)
    assert result.past_key_values is None
    assert result.sequences.shape == (1, 42)


def test_what_it_cannot_do_is_refused(repo):
    ids, reduce = make_ids(1, 40), {"max_new_tokens": 2, "min_tokens": 0, **repo}
    model = make_model()
    with pytest.raises(ValueError, match="keep_ratio is 2"):
        model.generate(ids, keep_ratio=2, **reduce)
    with pytest.raises(ValueError, match="past_key_values"):
        model.generate(ids, past_key_values=DynamicCache(), **reduce)
    with pytest.raises(ValueError, match="longer than the model's context of 128"):
        model.generate(make_ids(1, 130), **reduce)
    with pytest.raises(ValueError, match="full attention"):
        make_model("gemma2").generate(ids, **reduce)
    with pytest.raises(ValueError, match="does not know the blocks"):
        make_model("gpt2").generate(ids, **reduce)
    with pytest.raises(ValueError, match="dynamic cache"):
        model.generate(ids, use_cache=False, **reduce)
