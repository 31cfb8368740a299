"""The code beside an adapter: pinned to a commit, a later change of it does not run."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

import pytest
import torch
import transformers.utils.hub as transformers_hub
from huggingface_hub import CommitOperationAdd, HfApi
from transformers import dynamic_module_utils

from fedfstq_hf.demo import load_model
from fedfstq_hf.generation.published import HUB_PATH, custom_generate_source
from fedfstq_hf.generation.reducer import TokenReducer
from tests.loopback_hub.fixtures import hub, hub_here

__all__ = ["hub", "hub_here"]
REPO = "lab/adapter"
EVIL = b"def generate(model, **arguments):\n    raise RuntimeError('evil code ran')\n"
ROOT = Path(__file__).parents[3]


def commit(api: HfApi, source: bytes) -> str:
    return api.create_commit(REPO, [CommitOperationAdd(HUB_PATH, source)], commit_message="generate").oid


def test_a_pinned_commit_stays_what_it_was(hub_here, monkeypatch, tmp_path):
    monkeypatch.setattr(transformers_hub, "TRANSFORMERS_CACHE", str(tmp_path / "cache"), raising=False)
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    api = HfApi(endpoint=hub_here.endpoint, token=hub_here.user("ann", "write", org="lab"))
    api.create_repo(REPO, private=False)
    good = commit(api, custom_generate_source().encode())
    evil = commit(api, EVIL)
    model = load_model()
    ids = torch.randint(10, 60, (1, 60), generator=torch.Generator().manual_seed(0))
    how = {"max_new_tokens": 4, "do_sample": False}
    theirs = {"custom_generate": REPO, "trust_remote_code": True, "keep_ratio": 0.5, "min_tokens": 0}
    expected = model.generate(ids, custom_generate=TokenReducer(0.5, min_tokens=0), **how)
    assert torch.equal(model.generate(ids, revision=good, **theirs, **how), expected)
    for newest in ({}, {"revision": "main"}, {"revision": evil}):
        with pytest.raises(RuntimeError, match="evil code ran"):
            model.generate(ids, **newest, **theirs, **how)


def recommendations() -> list[tuple[str, str]]:
    texts = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "recipes").rglob("*.md")]
    texts += [*(ROOT / "fedfstq_hf").rglob("*.py"), *(ROOT / "fedfstq_hf").rglob("*.md")]
    found = []
    for path in texts:
        for call in re.findall(r"generate\([^()]*custom_generate=\"[^()]*\)", path.read_text(encoding="utf-8")):
            found.append((path.name, call))
    return found


def test_code_of_a_repo_is_recommended_with_a_commit_only():
    calls = recommendations()
    assert {name for name, _ in calls} >= {"generation.md", "generate.py"}
    for name, call in calls:
        assert "revision=" in call, (name, call)
    source = resources.files("fedfstq_hf.generation").joinpath(HUB_PATH).read_text(encoding="utf-8")
    assert "Whoever can write to ORG/REPO can change it" in source
