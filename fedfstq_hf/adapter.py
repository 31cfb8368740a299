"""The bridge to PEFT: an adapter's trained numbers as one vector, and checks that two parties mean the same model."""

from __future__ import annotations

import contextlib
import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from fedfstq_hf.adapters.allow_list import check_own
from fedfstq_hf.codec import Schema
from fedfstq_hf.codec.schema import is_lora_a
from fedfstq_hf.errors import AdapterMismatchError
from fedfstq_hf.text import printable

# What scales or shapes the adapter's effect without showing in its tensors.
_EFFECTIVE_LORA = (
    "alora_invocation_tokens",
    "alpha_pattern",
    "bias",
    "fan_in_fan_out",
    "layer_replication",
    "lora_alpha",
    "lora_bias",
    "peft_type",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "use_dora",
    "use_qalora",
    "use_rslora",
)
# Of other kinds of adapters all fields count, except those that name the base, or that the schema shows anyway.
_WITHOUT_EFFECT = (
    "auto_mapping",
    "base_model_name_or_path",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "peft_version",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
)
_BASE_CHANGING_INITS = ("pissa", "olora", "loftq", "corda", "eva", "lora_ga")
_PROBES = 16
_GROUPS, _PLAIN = 32, 8  # groups of tensors; the first ones are of embeddings and norms, which no quantisation touches
_VALUES = 256  # of a tensor
_APART = 0.15  # that sums of a group may differ by: rounding to bfloat16 moves them by a hundredth


class AdapterView:
    """The active adapter of a `PeftModel` as one float32 vector in schema order.

    Any kind of adapter will do whose saved tensors are its trained parameters; LoRA's factors A may be frozen.

    Raises:
        AdapterMismatchError: the model has no adapter, more than one active adapter, trains anything else besides, its
            adapter is not float32, or is one that cannot be federated.
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
        config = model.peft_config[self.name]
        check_config(config.to_dict())
        if config.is_prompt_learning:
            raise AdapterMismatchError(
                f"{config.peft_type.value} learns a prompt, not changes of weights, and is not supported. Use LoRA: "
                "get_peft_model(base, LoraConfig(...))."
            )
        _check_no_vocabulary_adapter(model)
        self._vocab_size = _vocab_size(model)
        state = get_peft_model_state_dict(model, adapter_name=self.name, save_embedding_layers=False)
        by_storage = {
            parameter.data_ptr(): parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
            or (is_lora_a(name) and self.name in name.split(".") and not config.inference_mode)
        }
        self.schema = Schema.from_state_dict(state)
        self.parameters: list[nn.Parameter] = []
        for spec in self.schema.tensors:
            tensor = state[spec.name]
            if tensor.dtype != torch.float32:
                raise AdapterMismatchError(
                    f"Adapter tensor {spec.name} is {tensor.dtype}; expected float32, also on a base of half the "
                    "precision. PEFT makes LoRA so by default (autocast_adapter_dtype=True), but not a head or a bias "
                    "that is trained beside it. Type: for p in model.parameters(): p.data = p.data.float() if "
                    "p.requires_grad else p.data; and train with bf16=True or fp16=True."
                )
            parameter = by_storage.pop(tensor.data_ptr(), None)
            if parameter is None:
                raise AdapterMismatchError(_not_trainable(spec.name, model, config))
            self.parameters.append(parameter)
        if by_storage:
            extra = next(name for name, p in model.named_parameters() if p.data_ptr() in by_storage)
            raise AdapterMismatchError(
                f"{extra} is trainable but no part of the adapter that travels. Freeze it (requires_grad_(False))."
            )

    @torch.no_grad()
    def read(self) -> Tensor:
        """A copy of the adapter, (num_params,) float32 on the CPU."""
        self._check_vocabulary()
        return torch.cat([parameter.detach().reshape(-1) for parameter in self.parameters]).cpu()

    @torch.no_grad()
    def write(self, vector: Tensor) -> None:
        """Set the adapter from a (num_params,) vector."""
        self._check_vocabulary()
        for spec, parameter in zip(self.schema.tensors, self.parameters, strict=True):
            parameter.copy_(vector[spec.offset : spec.offset + spec.size].view(parameter.shape))

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Within it the model may be cast to another precision; afterwards the adapter holds the numbers it held."""
        before = [parameter.data for parameter in self.parameters]
        try:
            yield
        finally:
            for parameter, data in zip(self.parameters, before, strict=True):
                if parameter.dtype != data.dtype:
                    parameter.data = data.to(parameter.device)

    def split(self, vector: Tensor) -> list[Tensor]:
        """A (num_params,) vector as copies in the parameters' shapes and on their devices, in schema order."""
        parts = (vector[spec.offset : spec.offset + spec.size] for spec in self.schema.tensors)
        return [
            part.view(parameter.shape).to(parameter.device, copy=True)
            for part, parameter in zip(parts, self.parameters, strict=True)
        ]

    def gradients(self) -> list[Tensor]:
        """Accumulated gradients in schema order; zeros where backward left none."""
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]

    def freeze_a(self, frozen: bool) -> None:
        """Freeze LoRA's factors A, or train them with the rest."""
        for spec, parameter in zip(self.schema.tensors, self.parameters, strict=True):
            if is_lora_a(spec.name):
                parameter.requires_grad_(not frozen)

    def state(self) -> dict[str, Tensor]:
        """The adapter as PEFT's state dict."""
        return self.schema.unflatten(self.read())

    def _check_vocabulary(self) -> None:
        size = _vocab_size(self.model)
        if size != self._vocab_size:
            raise AdapterMismatchError(
                f"The vocabulary was resized from {self._vocab_size} to {size} tokens, so that this is another base "
                "model than the federation's. Resize before the federation is founded, save the base, and load that "
                "one in every client; without new tokens, leave out resize_token_embeddings."
            )


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
    if config.get("kasa_config") is not None:
        raise AdapterMismatchError(
            "kasa_config truncates the base model's weights, which every client holds unchanged. Leave it out."
        )


def _check_no_vocabulary_adapter(model: PeftModel) -> None:
    for place, module in (
        ("input embeddings", model.get_input_embeddings()),
        ("LM head", model.get_base_model().get_output_embeddings()),
    ):
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            raise AdapterMismatchError(
                f"The adapter trains the {place}: matrices of the vocabulary's size, which every message would have to "
                "carry, and whose gradients token sensitivity is read from. Leave embed_tokens and lm_head out of "
                'target_modules, modules_to_save and trainable_token_indices; target_modules="all-linear" does.'
            )


def _not_trainable(name: str, model: PeftModel, config: Any) -> str:
    if not any(parameter.requires_grad for parameter in model.parameters()):
        return f"Adapter tensor {name} is not trainable. Make the adapter with inference_mode=False."
    if getattr(config, "save_projection", False):
        return (
            f"Adapter tensor {name} is a frozen projection that is saved with what is trained, and would travel. Make "
            f"the adapter with {type(config).__name__}(save_projection=False): projection_prng_key then stands for it."
        )
    return (
        f"Adapter tensor {name} is saved but not trained, so a {config.peft_type.value} adapter configured like this "
        "cannot be federated. Use LoRA, or a kind all of whose saved tensors are trained."
    )


def _vocab_size(model: PeftModel) -> int:
    try:
        weight = model.get_input_embeddings().weight
        rows, _ = weight.shape
    except (AttributeError, NotImplementedError, ValueError):
        raise AdapterMismatchError(
            f"{type(model.get_base_model()).__name__} looks up no token ids in input embeddings, which the sensitivity "
            "of tokens and the identity of the base are read from: models of images, sound or several towers are not "
            "supported. Use a language model."
        ) from None
    return int(rows)


def _plain(value: Any) -> Any:
    """As it comes back from a JSON file; None for whatever is empty or off."""
    return json.loads(json.dumps(sorted(value) if isinstance(value, set) else value, default=str)) or None


def _shown(value: Any) -> str:
    return printable(repr(_plain(value) if value else value))


def config_json(model: PeftModel, name: str) -> bytes:
    """`adapter_config.json` as PEFT writes it, for inference.

    Raises:
        AdapterMismatchError: no client would join with it, because a field is not one that allow_list.py believes.
    """
    config = model.peft_config[name].to_dict()
    config["inference_mode"] = True
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    data = (json.dumps(plain, indent=2, sort_keys=True, default=str) + "\n").encode()
    check_own(data)
    return data


def check_same_adapter(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Compare two adapter configurations in what changes the adapter's effect.

    Raises:
        AdapterMismatchError: naming the first difference.
    """
    lora = str(_plain(mine.get("peft_type"))) == str(_plain(theirs.get("peft_type"))) == "LORA"
    keys = _EFFECTIVE_LORA if lora else ("peft_type", *sorted({*mine, *theirs} - {"peft_type", *_WITHOUT_EFFECT}))
    for key in keys:
        if _plain(mine.get(key)) != _plain(theirs.get(key)):
            raise AdapterMismatchError(
                f"This model's adapter config has {key}={_shown(mine.get(key))}, the federation's has "
                f"{_shown(theirs.get(key))}. "
                "Make the adapter from the federation's adapter_config.json (PeftModel.from_pretrained(base, mailbox))."
            )


@torch.no_grad()
def base_fingerprint(model: PeftModel) -> dict[str, Any]:
    """What identifies a base model across precisions: its architecture, a few embedding values, and all its tensors.

    Of every tensor a few values enter two sums: the logarithm of their size, and their projection on fixed signs, which
    knows their order. All are compared with a tolerance, so that a bfloat16 load still matches its float32 original;
    the layers of a quantised one have no such sums, and are not compared.
    """
    config = model.get_base_model().config
    weight = _base_embeddings(model)
    rows, columns = (torch.linspace(0, size - 1, _PROBES).long() for size in weight.shape)
    probe = weight[rows.to(weight.device), columns.to(weight.device)].float().cpu()
    return {
        "model_type": config.model_type,
        "hidden_size": int(weight.shape[1]),
        **{name: getattr(config.get_text_config(), name, None) for name in ("vocab_size", "num_hidden_layers")},
        "embedding_probe": [float(f"{value:.6g}") for value in probe.tolist()],
        **_tensor_sums(model),
    }


def _base_embeddings(model: PeftModel) -> Tensor:
    """The base's input embeddings, or its largest tensor where it looks up no ids: shape (rows, columns)."""
    module: Any = None
    with contextlib.suppress(AttributeError, NotImplementedError):
        module = model.get_input_embeddings()  # which may be a copy of them that is trained, or a LoRA on them
    while isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
        module = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module.original_module
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        trained = _adapter_parameters(model)
        weight = max((p for p in model.get_base_model().parameters() if id(p) not in trained), key=Tensor.numel)
        weight = weight.reshape(-1, weight.shape[-1])
    return weight


def _tensor_sums(model: PeftModel) -> dict[str, list[float | None]]:
    """Sums over groups of the base's tensors: of embeddings and norms first, then of the layers' matrices and biases.

    None for those of the layers where a quantisation holds them in another form.
    """
    embedding, trained = _base_embeddings(model), _adapter_parameters(model)
    sizes, probes = [0.0] * _GROUPS, [0.0] * _GROUPS
    whole = getattr(model.get_base_model().config, "quantization_config", None) is None
    for name, tensor in model.get_base_model().named_parameters():
        if id(tensor) in trained:
            continue
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            whole = False
            continue
        flat = tensor.detach().reshape(-1)
        values = flat[:: max(1, flat.numel() // _VALUES)][:_VALUES].float().cpu()
        size = float(values.square().mean().sqrt()) if values.numel() else 0.0
        places = torch.arange(values.numel())
        signs = ((places * 2654435761 >> 13) & 1) * 2 - 1
        # by the name, as a quantised base may lack the parameters of its layers
        number = zlib.crc32(name.replace(".base_layer", "").replace(".original_module", "").encode())
        plain = tensor is embedding or (tensor.ndim < 2 and not name.endswith("bias"))
        group = number % _PLAIN if plain else _PLAIN + number % (_GROUPS - _PLAIN)
        sizes[group] += math.log2(max(size, 2.0**-40))
        probes[group] += float((values * signs).sum()) / max(size, 2.0**-40) / max(1, values.numel()) ** 0.5
    known = _GROUPS if whole else _PLAIN
    return {
        name: [round(value, 3) if group < known else None for group, value in enumerate(sums)]
        for name, sums in (("tensor_sizes", sizes), ("tensor_probes", probes))
    }


def _adapter_parameters(model: PeftModel) -> set[int]:
    """Ids of the parameters that PEFT added."""
    added: set[int] = set()
    for module in model.modules():
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            names = [*module.adapter_layer_names, *getattr(module, "other_param_names", ())]
            for held in (getattr(module, name, None) for name in names):
                parts = held.parameters() if isinstance(held, nn.Module) else [held]
                added.update(id(part) for part in parts if isinstance(part, Tensor))
    return added


def check_same_base(mine: Mapping[str, Any], theirs: Mapping[str, Any], name: str) -> None:
    """Compare two base fingerprints, and those of tokenizers where both have one.

    Raises:
        AdapterMismatchError: naming the first difference and the model to load.
    """
    remedy = f"Load the base model {printable(repr(name))}."
    for key in sorted(theirs, key=lambda key: key.startswith(("embedding_", "tensor_"))):  # last: they follow shapes
        expected, found = theirs[key], mine.get(key)
        if key == "tokenizer":
            if found not in (None, expected):
                raise AdapterMismatchError(
                    f"This tokenizer's vocabulary has sha256 {found:.12}, the federation's {printable(expected, 12)}: "
                    f"ids would stand for other tokens. Load the tokenizer of {printable(repr(name))}."
                )
        elif key.startswith("tensor_"):
            if not _same_sums(found or [], expected):
                raise AdapterMismatchError(
                    f"This base model has the federation's shape, but other weights ({printable(key)}). {remedy}"
                )
        elif key == "embedding_probe":
            if not _close(found or [], expected):
                raise AdapterMismatchError(
                    f"This base model has the federation's shape, but other weights: its embeddings differ. {remedy}"
                )
        elif found != expected:
            raise AdapterMismatchError(
                f"This base model has {printable(key)}={found!r}, the federation's has {printable(repr(expected))}. "
                f"{remedy}"
            )


def _same_sums(mine: Sequence[float | None], theirs: object) -> bool:
    """Whether two lists of `_tensor_sums` agree where both know a sum."""
    if not isinstance(theirs, list) or len(theirs) != len(mine):
        return False
    pairs = [(a, b) for a, b in zip(mine, theirs, strict=True) if a is not None and b is not None]
    return all(type(b) in (int, float) and abs(a - b) <= _APART for a, b in pairs)


def _close(mine: Sequence[float], theirs: object) -> bool:
    if not isinstance(theirs, list) or len(theirs) != len(mine) or not all(type(v) in (int, float) for v in theirs):
        return False
    a, b = torch.tensor(mine), torch.tensor(theirs, dtype=torch.float32)
    scale = float(b.abs().mean()) or 1.0
    return bool(torch.isfinite(b).all()) and bool(((a - b).abs() <= 0.05 * scale + 0.02 * b.abs()).all())
