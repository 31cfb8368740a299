"""Whether this machine computes in the precision that a recipe asks for, or only imitates it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fedfstq_hf.recipe import Recipe

_INSTRUCTIONS = {"x86_64": ("amx_bf16", "avx512_bf16"), "aarch64": ("bf16", "sve_bf16")}


def slow_bf16(recipe: Recipe) -> str | None:
    """A sentence for who runs `recipe` with `bf16: true` on a processor without bfloat16 instructions; else None.

    PyTorch computes the same there, converting every operand, and a run takes about ten times as long.
    """
    if not recipe.training.bf16 or torch.accelerator.is_available() or has_bf16(_capabilities()):
        return None
    return (
        "bf16: true, but this processor has no bfloat16 instructions and PyTorch imitates them, which takes about ten "
        "times as long. To train in float32: --training.bf16 false (run.py: --float32)."
    )


def has_bf16(capabilities: Mapping[str, Any]) -> bool:
    """Whether `torch.cpu.get_capabilities()` shows bfloat16 instructions; True where it does not say.

    Args:
        capabilities: name of an instruction set to whether the processor has it, and `architecture`.
    """
    names = _INSTRUCTIONS.get(capabilities.get("architecture", ""), ())
    known = [bool(capabilities[name]) for name in names if name in capabilities]
    return any(known) or not known


def _capabilities() -> Mapping[str, Any]:
    read = getattr(torch.cpu, "get_capabilities", None)  # not in PyTorch's older versions
    return read() if read is not None else {}
