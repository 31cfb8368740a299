"""How many numbers an adapter's configuration asks for, found from the base's shapes before anything is allocated."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from fedfstq_hf.errors import AdapterMismatchError

_ALWAYS_ALLOWED = 1 << 20  # numbers, 4 MiB: where the base is a toy

Shape = tuple[int, int]
"""Outputs and inputs of a module."""


def make_config(base: nn.Module, fields: Mapping[str, Any], *, inference_mode: bool) -> PeftConfig:
    """PEFT's configuration of an adapter whose numbers come from a file.

    Args:
        base: that it is for.
        fields: believed ones (allow_list.py). How the numbers would start is left to PEFT's default.

    Raises:
        AdapterMismatchError: the adapter would hold more numbers than the base, or PEFT refuses a field.
    """
    kind = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(fields["peft_type"])]
    given = {name: value for name, value in fields.items() if name not in ("init_lora_weights", "inference_mode")}
    try:
        config = kind(**given, inference_mode=inference_mode)
    except (TypeError, ValueError) as error:
        raise AdapterMismatchError(f"PEFT refuses the adapter's configuration: {error}") from error
    check_size(base, config)
    return config


def check_size(base: nn.Module, config: PeftConfig) -> None:
    """Refuse a configuration that makes an adapter larger than its base.

    Raises:
        AdapterMismatchError: saying both sizes.
    """
    held = sum(parameter.numel() for parameter in base.parameters())
    asked, most = count_numbers(base, config), max(held, _ALWAYS_ALLOWED)
    if asked > most:
        raise AdapterMismatchError(
            f"The adapter's configuration asks for about {asked:,} numbers on this base model of {held:,}; expected at "
            f"most {most:,}. A lower rank (r) makes it smaller."
        )


def count_numbers(base: nn.Module, config: PeftConfig) -> int:
    """Numbers that PEFT holds for an adapter at most, frozen ones and indices included.

    config: of a kind and with fields that allow_list.py believes.
    """
    shapes = dict(_shapes(base))
    targets = {name: shape for name, shape in shapes.items() if _targeted(config, name)}
    total = sum(_of_module(config, name, shape) for name, shape in targets.items())
    total += _shared(config, list(targets.values()))
    whole = tuple(getattr(config, "modules_to_save", None) or ())
    for name, module in base.named_modules():
        if name.endswith(whole):  # as PEFT matches them; nested ones are copied each
            total += sum(parameter.numel() for parameter in module.parameters())
    tokens: Any = getattr(config, "trainable_token_indices", None) or ()
    count = sum(map(len, tokens.values())) if isinstance(tokens, dict) else len(tokens)
    return total + count * max((shape[1] for shape in shapes.values()), default=0)


def _shapes(base: nn.Module) -> Iterator[tuple[str, Shape]]:
    for name, module in base.named_modules():
        outputs, inputs = getattr(module, "out_features", None), getattr(module, "in_features", None)
        weight = getattr(module, "weight", None)
        if isinstance(outputs, int) and isinstance(inputs, int):  # also where the weight is packed in four bits
            yield name, (outputs, inputs)
        elif isinstance(weight, Tensor) and weight.dim() > 1:
            yield name, (weight.shape[0], math.prod(weight.shape[1:]))


def _targeted(config: PeftConfig, name: str) -> bool:
    targets = config.target_modules
    if targets is None or (isinstance(targets, str) and targets.lower() == "all-linear"):
        return True  # not fewer than PEFT picks
    return bool(check_target_module_exists(config, name))


def _of_module(config: PeftConfig, name: str, shape: Shape) -> int:
    outputs, inputs = shape
    both, least = outputs + inputs, min(shape)
    rank = _by_pattern(config, "rank_pattern", name, getattr(config, "r", 0))
    match config.peft_type:
        case PeftType.LORA:
            return rank * both + outputs
        case PeftType.LOHA:
            return 2 * rank * both
        case PeftType.LOKR:
            return min(rank * both, outputs * inputs) + both
        case PeftType.IA3:
            return max(shape)
        case PeftType.OFT:
            block = min(config.oft_block_size or -(-inputs // max(rank, 1)), inputs)
            return inputs * block
        case PeftType.FOURIERFT:
            return 3 * _by_pattern(config, "n_frequency_pattern", name, config.n_frequency)
        case PeftType.VERA:
            return rank + outputs
        case PeftType.RANDLORA:
            return -(-least // rank) * (rank + least)
        case PeftType.UNILORA:
            return 3 * rank * both  # indices are of 64 bits
    raise AdapterMismatchError(f"It is not known how large an adapter of kind {config.peft_type} is.")


def _shared(config: PeftConfig, shapes: list[Shape]) -> int:
    """Numbers that all modules have in common."""
    if config.peft_type == PeftType.UNILORA:
        return int(config.theta_d_length)
    if not shapes or config.peft_type not in (PeftType.VERA, PeftType.RANDLORA):
        return 0
    outputs, inputs = (max(sizes) for sizes in zip(*shapes, strict=True))
    least, most = max(min(shape) for shape in shapes), max(outputs, inputs)
    if config.peft_type == PeftType.VERA:
        return int(config.r * (outputs + inputs))
    return int(config.r * least + most * (least + config.r))


def _by_pattern(config: PeftConfig, field: str, name: str, default: int) -> int:
    pattern = getattr(config, field, None) or {}
    return int(pattern.get(get_pattern_key(list(pattern), name), default))
