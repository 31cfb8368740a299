"""A tiny trained adapter, its base, and the shared form of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import PeftModel
from tiny import make_tiny_data, make_tiny_model
from torch import nn

from fedfstq_hf.sharing.compress import compress_adapter
from fedfstq_hf.sharing.packed import CompressedAdapter
from tests.loopback_hub.fixtures import hub, hub_client, hub_here

__all__ = ["hub", "hub_client", "hub_here"]


def trained(*, size: float = 0.05, **lora: object) -> PeftModel:
    """A tiny model whose adapter moved away from its start."""
    model = make_tiny_model(**lora)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator).to(parameter))
    return model.eval()


def fresh_base() -> nn.Module:
    return make_tiny_model().unload()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([row["input_ids"] for row in make_tiny_data(4)])).logits.float()


@pytest.fixture(scope="session")
def made() -> CompressedAdapter:
    """A compressed tiny adapter at 12 bits per parameter: coarse, and little of it is names and hashes."""
    return compress_adapter(trained(), "12bpp")


@pytest.fixture
def folder(made: CompressedAdapter, tmp_path) -> Callable[[], object]:
    made.save(tmp_path / "small")
    return tmp_path / "small"
