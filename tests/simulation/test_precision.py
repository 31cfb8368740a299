"""bf16 that the processor only imitates."""

import dataclasses

import pytest
import torch

from fedfstq_hf.recipe import load_recipe
from fedfstq_hf.simulation.runner import has_bf16, slow_bf16

OLD = {"architecture": "x86_64", "avx2": True, "amx_bf16": False, "avx512_bf16": False}


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        (OLD, False),
        (OLD | {"avx512_bf16": True}, True),
        (OLD | {"amx_bf16": True}, True),
        ({"architecture": "aarch64", "neon": True, "bf16": False}, False),
        ({"architecture": "aarch64", "neon": True, "bf16": True}, True),
        ({"architecture": "riscv64"}, True),
        ({}, True),
    ],
    ids=["x86 without", "avx512", "amx", "arm without", "arm with", "unknown architecture", "older PyTorch"],
)
def test_has_bf16_reads_what_pytorch_knows(capabilities: dict, expected: bool) -> None:
    assert has_bf16(capabilities) is expected


def test_who_asks_for_bf16_on_an_old_processor_reads_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: OLD, raising=False)
    recipe = load_recipe("quickstart")
    wanted = dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, bf16=True))
    assert slow_bf16(recipe) is None
    assert "--training.bf16 false" in (slow_bf16(wanted) or "")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert slow_bf16(wanted) is None
