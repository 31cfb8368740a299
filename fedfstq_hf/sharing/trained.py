"""A trained LoRA adapter as sharing sees it: its tensors in a model, which form pairs, and the plain form of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from fedfstq_hf.adapter import check_config
from fedfstq_hf.adapters.allow_list import MAX_BYTES, parse
from fedfstq_hf.adapters.size import make_config
from fedfstq_hf.errors import AdapterMismatchError, ConfigError, NonFiniteError
from fedfstq_hf.federation.adapter_file import MAX_HEADER, check_header
from fedfstq_hf.reporting.card.markup import TASKS
from fedfstq_hf.text import file_in, parse_object, read_in

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PACKED_KIND = "LORA, packed: use load_compressed_adapter of pip install fedfstq_hf"
PICKLED_FILE = "adapter_model.bin"
_PREFIX = "base_model.model."
_HEADS = (".score", ".classifier", ".classifier.out_proj", ".classification_head.out_proj", ".qa_outputs")
_OTHER_PRODUCTS = {
    "target_parameters": "LoRA on parameters, such as experts that are held in one tensor",
    "use_bdlora": "block-diagonal LoRA",
    "layer_replication": "LoRA on replicated layers",
}
"""Settings with which a module's effect is not the product of two matrices A and B."""
_APART = 0.01  # what embeddings may differ by, of their root mean square: rounding to bfloat16 is 0.004 of a value
_EXPECTED = "the folder of a PEFT adapter, as model.save_pretrained(FOLDER) writes it"


@dataclass(frozen=True)
class TrainedAdapter:
    """The one active LoRA adapter of a model.

    parameters: by PEFT's names in files. pairs: in the order of the model's modules.
    """

    model: PeftModel
    name: str
    parameters: dict[str, nn.Parameter]
    pairs: list[Pair]

    @property
    def config(self) -> dict[str, Any]:
        """PEFT's configuration."""
        fields: dict[str, Any] = self.model.peft_config[self.name].to_dict()
        return fields

    @property
    def num_params(self) -> int:
        """All numbers of the adapter, also those that are not in LoRA matrices."""
        return sum(p.numel() for p in self.parameters.values())

    def beside(self) -> dict[str, str]:
        """Tensors that are no LoRA matrices, each with the name of the first that has its memory: of tied weights."""
        first: dict[int, str] = {}
        names = sorted(set(self.parameters) - self.paired())
        return {name: first.setdefault(id(self.parameters[name]), name) for name in names}

    def state(self) -> dict[str, Tensor]:
        """The tensors, by name; they share the model's memory."""
        return {name: p.detach() for name, p in self.parameters.items()}

    def paired(self) -> set[str]:
        """Names of the tensors that are LoRA matrices of a pair."""
        return {name for pair in self.pairs for name in (pair.a, pair.b)}

    @contextmanager
    def replaced(self, state: Mapping[str, Tensor]) -> Iterator[None]:
        """The model with other values in its adapter, and with its own again afterwards."""
        before = {name: p.data for name, p in self.parameters.items()}
        try:
            for name, tensor in state.items():
                self.parameters[name].data = tensor.to(self.parameters[name].device)
            yield
        finally:
            for name, data in before.items():
                self.parameters[name].data = data


def trained_adapter(model: nn.Module) -> TrainedAdapter:
    """The active adapter of a PEFT model.

    Raises:
        AdapterMismatchError: no PEFT model, several active adapters, no LoRA, or one that changes the base.
        NonFiniteError: it holds NaN or infinity.
    """
    if not isinstance(model, PeftModel):
        raise AdapterMismatchError(
            f"Expected a PEFT model with a trained adapter, got {type(model).__name__}: type "
            "PeftModel.from_pretrained(base, ADAPTER), or give the adapter's folder."
        )
    if len(model.active_adapters) != 1:
        raise AdapterMismatchError(
            f"Expected one active adapter, found {list(model.active_adapters)}. Call model.set_adapter(NAME)."
        )
    name: str = model.active_adapters[0]
    check_lora(model.peft_config[name].to_dict())
    if not isinstance(model.get_base_model(), PreTrainedModel):
        raise AdapterMismatchError(
            f"The base is a {type(model.get_base_model()).__name__}; expected a model of transformers, by whose "
            "configuration others recognise it."
        )
    state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    by_storage = {p.data_ptr(): p for p in model.parameters() if p.numel()}
    parameters: dict[str, nn.Parameter] = {}
    for key in sorted(state):
        if state[key].data_ptr() not in by_storage:
            raise AdapterMismatchError(
                f"Adapter tensor {key} is not one of the model's parameters; expected a model that is held whole in "
                "memory (no offloading, no shards)."
            )
        if not bool(torch.isfinite(state[key]).all()):
            raise NonFiniteError(f"Adapter tensor {key} holds NaN or infinity; nothing was compressed.")
        parameters[key] = by_storage[state[key].data_ptr()]
    return TrainedAdapter(model, name, parameters, _pairs(model, name, state))


def _pairs(model: PeftModel, name: str, state: Mapping[str, Tensor]) -> list[Pair]:
    """In the order of the model's modules. Raises AdapterMismatchError where there is none."""
    scaling = {
        path: float(module.scaling[name])
        for path, module in model.named_modules()
        if isinstance(getattr(module, "scaling", None), dict) and name in module.scaling
    }
    order = {path: number for number, path in enumerate(scaling)}
    pairs = sorted(find_pairs(state, scaling), key=lambda pair: order.get(pair.module, len(order)))
    if not pairs:
        raise AdapterMismatchError("The adapter has no pair of LoRA matrices A and B; there is nothing to compress.")
    return pairs


def skeleton(
    base_model: str, fields: Mapping[str, Any], num_params: int | None = None, vocab_size: object = None
) -> TrainedAdapter:
    """An adapter of a configuration on a base without weights: names and shapes, for who wants no more.

    Args:
        base_model: Hub id or folder; its configuration alone is read.
        fields: of the adapter, believed ones.
        num_params: of the adapter: tells how many classes the base's head has.
        vocab_size: of the base that it was trained on, which may have been resized.

    Raises:
        ConfigError: the base's configuration cannot be read.
        AdapterMismatchError: the adapter does not fit it.
    """
    config = _base_config(base_model)
    if type(vocab_size) is int and 0 < vocab_size < 1 << 31:
        config.get_text_config().vocab_size = vocab_size
    adapter = _on_meta(config, base_model, fields)
    labels = None if num_params is None else labels_for(adapter, num_params)
    if labels is None:
        return adapter
    config.num_labels = labels
    return _on_meta(config, base_model, fields)


def _on_meta(config: PreTrainedConfig, base_model: str, fields: Mapping[str, Any]) -> TrainedAdapter:
    make: Any = _model_class(fields, config)
    try:
        with torch.device("meta"):
            base = make.from_config(config) if hasattr(make, "from_config") else make(config)
        adapter = make_config(base, dict(fields) | {"base_model_name_or_path": None}, inference_mode=True)
        model = get_peft_model(base, adapter)
    except Exception as error:  # PEFT raises what comes its way
        raise AdapterMismatchError(f"The adapter does not fit {base_model!r}: {error}") from error
    name: str = model.active_adapters[0]
    state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    held: dict[int, nn.Parameter] = {}  # by memory, which tied weights share
    parameters = {
        key: held.setdefault(tensor.untyped_storage()._cdata, nn.Parameter(tensor, requires_grad=False))
        for key, tensor in sorted(state.items())
    }
    return TrainedAdapter(model, name, parameters, _pairs(model, name, state))


def _base_config(name: str) -> PreTrainedConfig:
    from fedfstq_hf.running.foundation import resolve_model

    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(resolve_model(name), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"The configuration of {name!r} cannot be read: {error}\nGive a folder or a Hub id with --base-model."
        ) from error
    return config


def _model_class(fields: Mapping[str, Any], config: PreTrainedConfig, named: object = None) -> type:
    """The class by the adapter's task; without a task the class that is named, or that the base was saved as."""
    task = fields.get("task_type")
    for name in () if task else (named, *(config.architectures or ())):
        found = getattr(transformers, str(name), None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    return getattr(transformers, TASKS[str(task or "CAUSAL_LM")][1])  # type: ignore[no-any-return]


def load_task_base(name: str, folder: Path, dtype: str = "float32") -> nn.Module:
    """The base model of the plain adapter in a folder, with the head that its task needs; no tokenizer.

    Its vocabulary has as many tokens, and its head as many classes, as the adapter was trained with.

    Raises:
        ConfigError: it cannot be loaded.
        AdapterMismatchError: the folder holds no LoRA adapter.
    """
    from fedfstq_hf.running.foundation import resolve_model

    fields, config = read_config(folder), _base_config(name)
    data = json.loads(read_in(folder, CONFIG_FILE, MAX_BYTES, AdapterMismatchError, _EXPECTED))
    mapping = data.get("auto_mapping")
    named = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    heads = [shape for key, shape in tensor_shapes(folder).items() if _is_head(key)]
    labels = {"num_labels": heads[0][0], "ignore_mismatched_sizes": True} if heads else {}
    make: Any = _model_class(fields, config, named)
    try:
        model: nn.Module = make.from_pretrained(resolve_model(name), dtype=getattr(torch, dtype), **labels)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"The base model {name!r} cannot be loaded: {error}\nGive a folder or a Hub id with --base-model."
        ) from error
    fit_vocabulary(model, folder)
    return model


def fit_vocabulary(base: Any, folder: Path) -> None:
    """Give a base as many input embeddings as the plain adapter's file in a folder has, if it holds any."""
    try:
        embeddings = base.get_input_embeddings()
    except NotImplementedError:
        return
    path = next((name for name, module in base.named_modules() if module is embeddings), "")
    shape = tensor_shapes(folder).get(f"{_PREFIX}{path}.weight")
    if shape is not None and isinstance(embeddings, nn.Embedding) and shape[0] != embeddings.num_embeddings:
        base.resize_token_embeddings(shape[0])


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Of the plain adapter's file in a folder; empty where there is none.

    Raises:
        AdapterMismatchError: it cannot be read.
    """
    weights = file_in(folder, WEIGHTS_FILE, AdapterMismatchError)
    pickled = file_in(folder, PICKLED_FILE, AdapterMismatchError)
    if weights is not None:
        with weights.open("rb") as start:
            check_header(start.read(8), str(folder / WEIGHTS_FILE), MAX_HEADER, AdapterMismatchError)
    try:
        if weights is not None:
            with safe_open(weights, "pt") as file:
                return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        if pickled is not None:  # numbers alone are unpickled
            state = torch.load(pickled, map_location="cpu", weights_only=True)
            return {name: tuple(tensor.shape) for name, tensor in state.items()}
    except Exception as error:  # safetensors and pickle have errors of many kinds
        raise AdapterMismatchError(f"{weights or pickled} cannot be read: {error}") from error
    return {}


def _is_head(name: str) -> bool:
    """Whether a tensor is the last weight of a classifier that an adapter brings along."""
    return "lora_" not in name and name.removesuffix(".weight").endswith(_HEADS) and not name.endswith(".bias")


def num_labels(adapter: TrainedAdapter) -> int | None:
    """How many classes the head has that an adapter brings along; None where it brings none."""
    heads = [p for name, p in adapter.parameters.items() if _is_head(name) and p.ndim == 2]
    return len(heads[0]) if heads else None


def labels_for(adapter: TrainedAdapter, num_params: int) -> int | None:
    """How many classes make it an adapter of so many parameters; None where it is one, or no number does."""
    heads = [name for name, p in adapter.parameters.items() if _is_head(name) and p.ndim == 2]
    if not heads or adapter.num_params == num_params:
        return None
    stem, rows = heads[0].removesuffix("weight"), len(adapter.parameters[heads[0]])
    each = sum(adapter.parameters[name].numel() for name in (heads[0], f"{stem}bias") if name in adapter.parameters)
    more, rest = divmod((num_params - adapter.num_params) * rows, each)
    return rows + more if rest == 0 and 0 < rows + more < 1 << 20 else None


def load_trained(base: nn.Module, folder: Path) -> PeftModel:
    """A base with the plain adapter in a folder.

    Raises:
        AdapterMismatchError: the folder lacks a file, holds no LoRA adapter, or not one for this base.
    """
    fields = read_config(folder)
    shapes = tensor_shapes(folder)
    if not shapes:
        raise AdapterMismatchError(f"There is no {WEIGHTS_FILE} in {folder}; expected {_EXPECTED}.")
    config = make_config(base, fields, inference_mode=True)
    known = base.state_dict()
    before = {  # PEFT writes embeddings that the file holds into the base
        name: known[own].clone()
        for name in shapes
        if (own := name.removeprefix(_PREFIX).replace(".base_layer.", ".")) in known
    }
    try:
        model = PeftModel.from_pretrained(base, str(folder), config=config)
    except Exception as error:  # PEFT raises what comes its way
        raise AdapterMismatchError(f"The adapter in {folder} does not load on this base model: {error}") from error
    model.peft_config[model.active_adapter].init_lora_weights = fields.get("init_lora_weights", True)
    mine = get_peft_model_state_dict(model, save_embedding_layers=False)
    after = model.state_dict()
    for name in sorted(set(before) - set(mine)):
        old, new = before[name].float(), after.get(name, before[name]).float()
        if old.shape != new.shape or float((new - old).abs().max()) > _APART * float(old.square().mean().sqrt()):
            raise AdapterMismatchError(
                f"The adapter's file holds {name} as a tensor of the base that is not this base's, and the compressed "
                "form has no place for it. Give the base that the adapter was trained on (base_model=, with its "
                "resized embeddings), or make new tokens part of the adapter (modules_to_save, trainable_token_indices)"
                "."
            )
    return model


def read_config(folder: Path) -> dict[str, Any]:
    """The believed fields (allow_list.py) of the `adapter_config.json` in a folder.

    Raises:
        AdapterMismatchError: there is none, it cannot be read, or is no LoRA adapter's.
    """
    path = folder / CONFIG_FILE
    others = [] if path.exists() else sorted(str(found.parent) for found in folder.glob(f"*/{CONFIG_FILE}"))
    if others:
        raise AdapterMismatchError(
            f"There is no {CONFIG_FILE} in {folder}, but adapters in {', '.join(others[:4])}: give one of these."
        )
    data = read_in(folder, CONFIG_FILE, MAX_BYTES, AdapterMismatchError, _EXPECTED)
    given = parse_object(data, str(path), max_bytes=MAX_BYTES, error=AdapterMismatchError)
    if given.get("peft_type") == PACKED_KIND:
        raise AdapterMismatchError(
            f"{folder} holds a compressed adapter already; `fedfstq expand {folder} --out FOLDER` makes it a plain one."
        )
    _check_products(given)
    return parse(data, str(path), AdapterMismatchError, ("LORA",))


def check_lora(config: Mapping[str, Any]) -> None:
    """Refuse what is no LoRA adapter, or one whose start changes the base model.

    Raises:
        AdapterMismatchError: saying which.
    """
    kind = getattr(config.get("peft_type"), "value", config.get("peft_type"))
    if kind != "LORA":
        raise AdapterMismatchError(f"This adapter's peft_type is {kind!r}; only LORA can be compressed.")
    _check_products(config)
    check_config(config)


def _check_products(config: Mapping[str, Any]) -> None:
    for name, what in _OTHER_PRODUCTS.items():
        if config.get(name):
            raise AdapterMismatchError(
                f"The adapter sets {name}: {what}. Only LoRA whose effect on a module is the product of two matrices "
                "can be compressed; share this one as it is (model.push_to_hub)."
            )


_SUFFIXES = {".lora_A.weight": ".lora_B.weight", ".lora_embedding_A": ".lora_embedding_B"}


@dataclass(frozen=True)
class Pair:
    """Names of one module's two LoRA matrices, and its effect's scale (alpha / r, or as configured)."""

    module: str
    a: str
    b: str
    scaling: float = 1.0


def find_pairs(state: Mapping[str, Tensor], scaling: Mapping[str, float]) -> list[Pair]:
    """The pairs that can be multiplied, sorted by module; scaling: module name in the state -> factor of B A."""
    pairs = []
    for name in sorted(state):
        for a_suffix, b_suffix in _SUFFIXES.items():
            module, other = name.removesuffix(a_suffix), name.removesuffix(a_suffix) + b_suffix
            if name.endswith(a_suffix) and other in state and state[other].numel() % max(len(state[name]), 1) == 0:
                a, b = state[name], state[other]
                if a.dim() >= 2 and b.dim() >= 2 and b.shape[1] == len(a) and b[0].numel() == len(a):
                    pairs.append(Pair(module, name, other, scaling.get(module, 1.0)))
    return pairs
