"""The bridge to PEFT: a LoRA model's trained numbers as one vector, and checks that two parties mean the same model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn

from fedfstq_hf.codec import Schema
from fedfstq_hf.errors import AdapterMismatchError

# What scales or shapes the adapter's effect without showing in its tensors.
_EFFECTIVE_CONFIG = (
    "alpha_pattern",
    "bias",
    "fan_in_fan_out",
    "lora_alpha",
    "lora_bias",
    "peft_type",
    "r",
    "rank_pattern",
    "use_dora",
    "use_rslora",
)
_BASE_CHANGING_INITS = ("pissa", "olora", "loftq", "corda", "eva", "lora_ga")
_PROBES = 16


class AdapterView:
    """The active adapter of a `PeftModel` as one float32 vector in schema order.

    Raises:
        AdapterMismatchError: the model has no adapter, more than one active adapter, trains anything else besides, or
            its adapter is not float32.
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, PeftModel):
            raise AdapterMismatchError(
                f"Expected a PEFT model, got {type(model).__name__}: wrap the base first, for example "
                'get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")).'
            )
        if len(model.active_adapters) != 1:
            raise AdapterMismatchError(
                f"Expected one active adapter, found {list(model.active_adapters)}. Call model.set_adapter(NAME)."
            )
        self.model = model
        self.name: str = model.active_adapters[0]
        check_config(model.peft_config[self.name].to_dict())
        state = get_peft_model_state_dict(model, adapter_name=self.name, save_embedding_layers=False)
        by_storage = {parameter.data_ptr(): parameter for parameter in model.parameters() if parameter.requires_grad}
        self.schema = Schema.from_state_dict(state)
        self.parameters: list[nn.Parameter] = []
        for spec in self.schema.tensors:
            tensor = state[spec.name]
            if tensor.dtype != torch.float32:
                raise AdapterMismatchError(
                    f"Adapter tensor {spec.name} is {tensor.dtype}; expected float32 (PEFT's default, "
                    "autocast_adapter_dtype=True), which also holds on a bfloat16 base."
                )
            parameter = by_storage.pop(tensor.data_ptr(), None)
            if parameter is None:
                raise AdapterMismatchError(
                    f"Adapter tensor {spec.name} is not trainable. Make the adapter with inference_mode=False."
                )
            self.parameters.append(parameter)
        if by_storage:
            extra = next(name for name, p in model.named_parameters() if p.data_ptr() in by_storage)
            raise AdapterMismatchError(
                f"{extra} is trainable but no part of the adapter that travels. Freeze it (requires_grad_(False))."
            )

    @torch.no_grad()
    def read(self) -> Tensor:
        """A copy of the adapter, (num_params,) float32 on the CPU."""
        return torch.cat([parameter.detach().reshape(-1) for parameter in self.parameters]).cpu()

    @torch.no_grad()
    def write(self, vector: Tensor) -> None:
        """Set the adapter from a (num_params,) vector."""
        for spec, parameter in zip(self.schema.tensors, self.parameters, strict=True):
            parameter.copy_(vector[spec.offset : spec.offset + spec.size].view(parameter.shape))

    def gradients(self) -> list[Tensor]:
        """Accumulated gradients in schema order; zeros where backward left none."""
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]

    def state(self) -> dict[str, Tensor]:
        """The adapter as PEFT's state dict."""
        return self.schema.unflatten(self.read())


def check_config(config: Mapping[str, Any]) -> None:
    """Refuse LoRA configurations that cannot be federated.

    Raises:
        AdapterMismatchError: the initialisation changes the base model, so that clients would hold different bases.
    """
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING_INITS):
        raise AdapterMismatchError(
            f"init_lora_weights={init!r} changes the base model's weights, which every client holds unchanged. "
            "Use init_lora_weights=True or 'gaussian'."
        )


def config_json(model: PeftModel, name: str) -> bytes:
    """`adapter_config.json` as PEFT writes it, for inference."""
    config = model.peft_config[name].to_dict()
    config["inference_mode"] = True
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    return (json.dumps(plain, indent=2, sort_keys=True, default=str) + "\n").encode()


def check_same_adapter(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Compare two adapter configurations in what changes the adapter's effect.

    Raises:
        AdapterMismatchError: naming the first difference.
    """
    for key in _EFFECTIVE_CONFIG:
        if (mine.get(key) or None) != (theirs.get(key) or None):
            raise AdapterMismatchError(
                f"This model's LoRA config has {key}={mine.get(key)!r}, the federation's has {theirs.get(key)!r}. "
                "Make the adapter from the federation's adapter_config.json (PeftModel.from_pretrained(base, mailbox))."
            )


@torch.no_grad()
def base_fingerprint(model: PeftModel) -> dict[str, Any]:
    """What identifies a base model across precisions: its architecture and a few input embedding values.

    The values are compared with a tolerance, so that a bfloat16 or a quantised load still matches its float32 original.
    """
    config = model.get_base_model().config
    weight = model.get_input_embeddings().weight
    rows = torch.linspace(0, weight.shape[0] - 1, _PROBES).long()
    columns = torch.linspace(0, weight.shape[1] - 1, _PROBES).long()
    probe = weight[rows.to(weight.device), columns.to(weight.device)].float().cpu()
    return {
        "model_type": config.model_type,
        "hidden_size": int(weight.shape[1]),
        "vocab_size": int(config.get_text_config().vocab_size),
        "num_hidden_layers": int(config.get_text_config().num_hidden_layers),
        "embedding_probe": [float(f"{value:.6g}") for value in probe.tolist()],
    }


def check_same_base(mine: Mapping[str, Any], theirs: Mapping[str, Any], name: str) -> None:
    """Compare two base fingerprints.

    Raises:
        AdapterMismatchError: naming the first difference and the model to load.
    """
    remedy = f"Load the base model {name!r}."
    for key, expected in theirs.items():
        found = mine.get(key)
        if key == "embedding_probe":
            if not _close(found or [], expected):
                raise AdapterMismatchError(
                    f"This base model has the federation's shape, but other weights: its embeddings differ. {remedy}"
                )
        elif found != expected:
            raise AdapterMismatchError(
                f"This base model has {key}={found!r}, the federation's has {expected!r}. {remedy}"
            )


def _close(mine: Sequence[float], theirs: Sequence[float]) -> bool:
    a, b = torch.tensor(mine), torch.tensor(theirs)
    scale = float(b.abs().mean()) or 1.0
    return a.shape == b.shape and bool(((a - b).abs() <= 0.05 * scale + 0.02 * b.abs()).all())
