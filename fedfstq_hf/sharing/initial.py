"""PEFT's seeded start of a LoRA adapter, drawn again: what a seed gives need not be stored.

Relied on: the 32-bit Mersenne twister of torch's CPU generator behind `torch.rand` (24 bits a draw), and the order in
which PEFT draws for `init_lora_weights=True`: per module, in the model's order, first the two `nn.Linear` of A and B as
torch makes them, then A again. The arithmetic is our own, so neither PEFT's version nor the base's device or dtype
matters when a file is read. Whether it came out the same there is checked by sha256.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedfstq_hf.errors import AdapterMismatchError
from fedfstq_hf.federation import adapter_file
from fedfstq_hf.sharing.pairs import Pair


def initial_state(
    shapes: Mapping[str, tuple[int, ...]], pairs: Sequence[Pair], config: Mapping[str, Any], seed: int | None
) -> dict[str, Tensor]:
    """The float32 state that a shared adapter is coded against: zeros, and with a seed PEFT's random A.

    Args:
        shapes: of every coded tensor.
        pairs: in the order in which PEFT makes the modules; used with a seed only.
        config: PEFT's LoRA configuration.
        seed: what `transformers.set_seed` was given right before `get_peft_model`; None: not known.

    Raises:
        AdapterMismatchError: this configuration's start cannot be drawn again.
    """
    state = {name: torch.zeros(shape) for name, shape in shapes.items()}
    if seed is None:
        return state
    _check_seeded(pairs, config)
    generator = torch.Generator().manual_seed(seed)
    for pair in pairs:
        rank, width = shapes[pair.a]
        _skip(rank * width, generator)
        _skip(math.prod(shapes[pair.b]), generator)
        if config.get("lora_bias"):
            _skip(shapes[pair.b][0], generator)
        # what kaiming_uniform_(a=sqrt(5)) comes to, in its order of operations
        bound = math.sqrt(3.0) * (math.sqrt(2.0 / (1 + math.sqrt(5) ** 2)) / math.sqrt(width))
        drawn = torch.rand(rank * width, generator=generator).numpy().astype(np.float64)
        # one rounding at the end, as torch's kernels with fused multiply-add do; exact in float64 until then
        values = (drawn * np.float64(np.float32(2 * bound)) + np.float64(np.float32(-bound))).astype(np.float32)
        state[pair.a] = torch.from_numpy(values).view(rank, width)
    return state


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """Hex sha256 of a state as a PEFT adapter file."""
    return hashlib.sha256(adapter_file.dump(state)).hexdigest()


def _check_seeded(pairs: Sequence[Pair], config: Mapping[str, Any]) -> None:
    init = config.get("init_lora_weights", True)
    others = [pair.a for pair in pairs if not pair.a.endswith(".lora_A.weight")]
    if init is not True or others:
        reason = f"it has {others[0]}" if others else f"its init_lora_weights is {init!r}"
        raise AdapterMismatchError(
            f"init_seed was given, but this adapter's start cannot be drawn again: {reason}; expected linear layers "
            "and init_lora_weights=True. Leave init_seed out."
        )


def _skip(count: int, generator: torch.Generator) -> None:
    torch.rand(count, generator=generator)
