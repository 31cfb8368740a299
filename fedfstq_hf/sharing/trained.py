"""A trained LoRA adapter as sharing sees it: its tensors in a model, which form pairs, and its configuration.

A pair leaves freedom: B A = (B G^-1)(G A) for any invertible G. An error is counted where it acts, in the product:
`scale * sum_oi output_o input_i (B~ A~ - B A)_oi^2`, with the weights of inputs and outputs that a calibration set
gives (calibration.py), or ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import safe_open
from torch import Tensor, nn

from fedfstq_hf.adapter import check_config
from fedfstq_hf.adapters.allow_list import MAX_BYTES, check_own, parse
from fedfstq_hf.adapters.size import make_config
from fedfstq_hf.errors import AdapterMismatchError, ConfigError, NonFiniteError
from fedfstq_hf.federation.adapter_file import MAX_HEADER, check_header
from fedfstq_hf.reporting.card.markup import TASKS
from fedfstq_hf.text import file_in, read_in

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PACKED_KIND = "LORA, packed: use load_compressed_adapter of pip install fedfstq_hf"
PICKLED_FILE = "adapter_model.bin"
_HEADS = (".score.weight", ".classifier.weight", ".classifier.out_proj.weight", ".qa_outputs.weight")
_EXPECTED = "the folder of a PEFT adapter, as model.save_pretrained(FOLDER) writes it"
# Written even where they have their default: they decide what the adapter does, and a default may change.
_ALWAYS = ("base_model_name_or_path", "lora_alpha", "peft_type", "r", "target_modules", "task_type")
# Facts about where it was made, which PEFT fills in again.
_NEVER = ("auto_mapping", "inference_mode", "peft_version")


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


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and afterwards in the mode that it was in."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def differentiable(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Gradients of these parameters can be taken, whether or not they are trained."""
    before = [p.requires_grad for p in parameters]
    try:
        for p in parameters:
            p.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for p, needed in zip(parameters, before, strict=True):
            p.requires_grad_(needed)


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


def skeleton(base_model: str, fields: Mapping[str, Any]) -> TrainedAdapter:
    """An adapter of a configuration on a base without weights: names and shapes, for who wants no more.

    Args:
        base_model: Hub id or folder; its configuration alone is read.
        fields: of the adapter, believed ones.

    Raises:
        ConfigError: the base's configuration cannot be read.
        AdapterMismatchError: the adapter does not fit it.
    """
    import transformers

    from fedfstq_hf.running.foundation import resolve_model

    _, auto_class = TASKS.get(str(fields.get("task_type")), (None, "AutoModelForCausalLM"))
    try:
        config = transformers.AutoConfig.from_pretrained(resolve_model(base_model), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"The configuration of {base_model!r} cannot be read: {error}") from error
    try:
        with torch.device("meta"):
            base = getattr(transformers, auto_class).from_config(config, trust_remote_code=False)
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


def load_task_base(name: str, folder: Path, dtype: str = "float32") -> nn.Module:
    """The base model of the plain adapter in a folder, with the head that its task needs; no tokenizer.

    Raises:
        ConfigError: it cannot be loaded.
        AdapterMismatchError: the folder holds no LoRA adapter.
    """
    import transformers

    from fedfstq_hf.running.foundation import resolve_model

    _, auto_class = TASKS.get(str(read_config(folder).get("task_type")), (None, "AutoModelForCausalLM"))
    labels = _num_labels(folder)
    try:
        model: nn.Module = getattr(transformers, auto_class).from_pretrained(
            resolve_model(name), dtype=getattr(torch, dtype), trust_remote_code=False, **labels
        )
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"The base model {name!r} cannot be loaded: {error}\nGive a folder or a Hub id with --base-model."
        ) from error
    return model


def _num_labels(folder: Path) -> dict[str, int]:
    """How many classes the head has that an adapter brings along; nothing where it brings none."""
    weights = file_in(folder, WEIGHTS_FILE, AdapterMismatchError)
    if weights is None:
        return {}
    with safe_open(weights, "pt") as file:
        heads = [name for name in file.keys() if name.endswith(_HEADS)]  # noqa: SIM118
        return {"num_labels": int(file.get_slice(heads[0]).get_shape()[0])} if heads else {}


def load_trained(base: nn.Module, folder: Path) -> PeftModel:
    """A base with the plain adapter in a folder.

    Raises:
        AdapterMismatchError: the folder lacks a file, holds no LoRA adapter, or not one for this base.
    """
    fields = read_config(folder)
    weights = file_in(folder, WEIGHTS_FILE, AdapterMismatchError)
    if weights is not None:
        with weights.open("rb") as file:
            check_header(file.read(8), str(folder / WEIGHTS_FILE), MAX_HEADER, AdapterMismatchError)
    elif file_in(folder, PICKLED_FILE, AdapterMismatchError) is None:  # PEFT unpickles numbers alone
        raise AdapterMismatchError(f"There is no {WEIGHTS_FILE} in {folder}; expected {_EXPECTED}.")
    config = make_config(base, fields, inference_mode=True)
    try:
        model = PeftModel.from_pretrained(base, str(folder), config=config)
    except Exception as error:  # PEFT raises what comes its way
        raise AdapterMismatchError(f"The adapter in {folder} does not load on this base model: {error}") from error
    model.peft_config[model.active_adapter].init_lora_weights = fields.get("init_lora_weights", True)
    return model


def read_config(folder: Path) -> dict[str, Any]:
    """The believed fields (allow_list.py) of the `adapter_config.json` in a folder.

    Raises:
        AdapterMismatchError: there is none, it cannot be read, or is no LoRA adapter's.
    """
    data = read_in(folder, CONFIG_FILE, MAX_BYTES, AdapterMismatchError, _EXPECTED)
    return parse(data, str(folder / CONFIG_FILE), AdapterMismatchError, ("LORA",))


def check_lora(config: Mapping[str, Any]) -> None:
    """Refuse what is no LoRA adapter, or one whose start changes the base model.

    Raises:
        AdapterMismatchError: saying which.
    """
    kind = getattr(config.get("peft_type"), "value", config.get("peft_type"))
    if kind != "LORA":
        raise AdapterMismatchError(f"This adapter's peft_type is {kind!r}; only LORA can be compressed.")
    check_config(config)


def compact_config(config: Mapping[str, Any], *, packed: bool = False) -> bytes:
    """`adapter_config.json` with what differs from PEFT's defaults, in few bytes; PEFT reads it.

    packed: there is no file beside it that PEFT could load. The kind is then none that PEFT knows, so that its error
    names this package.

    Raises:
        AdapterMismatchError: a setting cannot be written as JSON, or nobody would believe it.
    """
    defaults = LoraConfig().to_dict()
    kept = {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in config.items()
        if key not in _NEVER and (key in _ALWAYS or value != defaults.get(key))
    }
    kept["inference_mode"] = True
    try:
        data = (json.dumps(kept, sort_keys=True, separators=(",", ":")) + "\n").encode()
    except TypeError as error:
        raise AdapterMismatchError(f"The adapter's configuration cannot be written as JSON: {error}") from error
    check_own(data)
    return data.replace(b'"peft_type":"LORA"', f'"peft_type":"{PACKED_KIND}"'.encode()) if packed else data


def as_lora(data: bytes) -> bytes:
    """The configuration that was packed, as PEFT knows it."""
    return data.replace(PACKED_KIND.encode(), b"LORA")


_SUFFIXES = {".lora_A.weight": ".lora_B.weight", ".lora_embedding_A": ".lora_embedding_B"}


@dataclass(frozen=True)
class Pair:
    """Names of one module's two LoRA matrices, and its effect's scale (alpha / r, or as configured)."""

    module: str
    a: str
    b: str
    scaling: float = 1.0


@dataclass(frozen=True)
class PairWeights:
    """What an error in a module's product costs: float64 output (out,), input (in,), mean 1 each, times `scale`."""

    output: Tensor
    input: Tensor
    scale: float


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


def matrices(state: Mapping[str, Tensor], pair: Pair) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r), float64 on the CPU."""
    a, b = state[pair.a], state[pair.b]
    return a.detach().double().cpu().reshape(len(a), -1), b.detach().double().cpu().reshape(len(b), -1)


def even_weights(state: Mapping[str, Tensor], pair: Pair) -> PairWeights:
    """Weights without calibration: every entry of the scaled product counts the same."""
    a, b = matrices(state, pair)
    return PairWeights(torch.ones(len(b)).double(), torch.ones(a.shape[1]).double(), pair.scaling**2)


def balance(a: Tensor, b: Tensor, weights: PairWeights) -> tuple[Tensor, Tensor]:
    """A and B of the same product whose components are orthogonal under the weights, the strongest first.

    From the singular value decomposition of the weighted product, B D_out U S^1/2 and S^1/2 V^T. What carries little
    then stands alone, and gets few bits or none.
    """
    root_out, root_in = weights.output.sqrt()[:, None], weights.input.sqrt()[:, None]
    q_b, r_b = torch.linalg.qr(root_out * b)
    q_a, r_a = torch.linalg.qr(root_in * a.T)
    u, s, vt = torch.linalg.svd(r_b @ r_a.T)
    rank = min(len(s), len(a))
    new_b, new_a = torch.zeros_like(b), torch.zeros_like(a)
    new_b[:, :rank] = (q_b @ u[:, :rank]) * s[:rank].sqrt() / root_out
    new_a[:rank] = ((q_a @ vt.T[:, :rank]) * s[:rank].sqrt() / root_in).T
    return new_a, new_b


def coordinate_weights(a: Tensor, b: Tensor, weights: PairWeights) -> tuple[Tensor, Tensor]:
    """What a small error in one coordinate of A (r, in) and of B (out, r) costs in the product."""
    of_a = (b.square() * weights.output[:, None]).sum(dim=0)
    of_b = (a.square() * weights.input).sum(dim=1)
    scale = weights.scale
    return scale * of_a[:, None] * weights.input[None, :], scale * weights.output[:, None] * of_b[None, :]


def product_error(a: Tensor, b: Tensor, other_a: Tensor, other_b: Tensor, weights: PairWeights) -> float:
    """Weighted squared difference of two products, without forming them."""
    left = torch.cat([other_b, -b], dim=1)
    right = torch.cat([other_a, a])
    gram_left = left.T @ (weights.output[:, None] * left)
    gram_right = (right * weights.input) @ right.T
    return weights.scale * max(float((gram_left * gram_right).sum()), 0.0)
