"""A compressed adapter back onto its base model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from torch import Tensor, nn

from fedfstq_hf.adapter import base_fingerprint, check_same_base
from fedfstq_hf.adapters import allow_list
from fedfstq_hf.adapters.size import make_config
from fedfstq_hf.codec import Schema, get_codec, message
from fedfstq_hf.errors import AdapterMismatchError, ConfigError, MessageError
from fedfstq_hf.federation.adapter_file import load_tensors
from fedfstq_hf.sharing.initial import initial_state, state_sha256
from fedfstq_hf.sharing.packed import EXACT_FILE, FACTS_FILE, MESSAGE_FILE, Facts, check_digest
from fedfstq_hf.sharing.trained import CONFIG_FILE, TrainedAdapter, trained_adapter
from fedfstq_hf.text import printable

_MESSAGE_ROOM = 4096  # beyond 4 bytes per parameter: the message's header
Read = Callable[[str, int], bytes]
"""Reads one of the files, of at most so many bytes."""


def expand(base_model: nn.Module, facts: Facts, read: Read) -> PeftModel:
    """The base with the adapter, for inference. It is wrapped in place, as PEFT does; on errors left as it was.

    Raises:
        AdapterMismatchError: the base is another one, or already has an adapter.
        MessageError: a file is damaged, not for this adapter, or asks for what is not believed (allow_list.py).
    """
    if isinstance(base_model, PeftModel):
        raise AdapterMismatchError("The base model already has an adapter; give the plain base (model.unload()).")
    config_bytes = read(CONFIG_FILE, allow_list.MAX_BYTES)
    check_digest(CONFIG_FILE, config_bytes, facts.sha256[CONFIG_FILE])
    fields = allow_list.parse(config_bytes, CONFIG_FILE, MessageError, ("LORA",))
    remedy = f"Load {_base_name(fields)}."
    training = base_model.training
    try:
        # the base that the file names is not looked up: the adapter's is the one given here
        config = make_config(base_model, fields | {"base_model_name_or_path": None}, inference_mode=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about weights that are replaced a moment later
            model = get_peft_model(base_model, config)
    except Exception as error:  # PEFT raises what comes its way
        raise AdapterMismatchError(
            f"The adapter does not fit this base model: {printable(error, 400)} {remedy}"
        ) from error
    try:
        _check_base(base_fingerprint(model), facts.base, remedy)
        adapter = trained_adapter(model)
        state = _decode(adapter, facts, read)
        set_peft_model_state_dict(model, state, adapter_name=adapter.name)
    except BaseException:
        model.unload()
        base_model.train(training)
        raise
    model.eval()
    return model


def _decode(adapter: TrainedAdapter, facts: Facts, read: Read) -> dict[str, Tensor]:
    if facts.num_params != adapter.num_params:
        raise AdapterMismatchError(
            f"The compressed adapter has {facts.num_params} parameters, its configuration makes {adapter.num_params} "
            "on this base model; load the base that it was made for."
        )
    data = read(MESSAGE_FILE, 4 * adapter.num_params + _MESSAGE_ROOM)
    check_digest(MESSAGE_FILE, data, facts.sha256[MESSAGE_FILE])
    header, payload = message.unpack(data)
    shapes = {name: tuple(adapter.parameters[name].shape) for name in sorted(adapter.paired())}
    reference = initial_state(shapes, adapter.pairs, adapter.config, facts.seed)
    schema = Schema.from_state_dict(reference)
    if schema.fingerprint != header.schema:
        raise AdapterMismatchError(
            f"The compressed adapter's tensors (schema {header.schema[:12]}) are not those that its configuration "
            f"makes on this base model ({schema.fingerprint[:12]}); load the base that it was made for."
        )
    if state_sha256(reference) != header.base:
        raise AdapterMismatchError(
            f"The start that seed {facts.seed} gives here has another sha256 than the one that the adapter was coded "
            f"against. It is drawn by torch's CPU generator (here torch {torch.__version__}), which must give the same "
            f"numbers as where the file was made ({printable(facts.made_by or FACTS_FILE)})."
        )
    try:
        codec = get_codec(header.codec, **header.params)
    except ConfigError as error:
        raise MessageError(f"{MESSAGE_FILE} needs a codec that cannot be made here: {error}") from error
    vector = codec.decode(payload, schema).to_dense() + schema.flatten(reference)
    if not bool(torch.isfinite(vector).all()):
        raise MessageError(f"{MESSAGE_FILE} decodes to values that are not finite")
    return {**schema.unflatten(vector), **_exact(adapter, facts, read)}


def _exact(adapter: TrainedAdapter, facts: Facts, read: Read) -> dict[str, Tensor]:
    expected = {name: adapter.parameters[name] for name in sorted(set(adapter.parameters) - adapter.paired())}
    if not expected and EXACT_FILE not in facts.sha256:
        return {}
    if EXACT_FILE not in facts.sha256:
        raise MessageError(f"{FACTS_FILE} names no {EXACT_FILE}, but the adapter has {next(iter(expected))}")
    room = sum(4 * p.numel() + 1024 for p in expected.values()) + _MESSAGE_ROOM
    data = read(EXACT_FILE, room)
    check_digest(EXACT_FILE, data, facts.sha256[EXACT_FILE])
    header = _MESSAGE_ROOM + sum(256 + 6 * len(name) for name in expected)
    state = load_tensors(data, EXACT_FILE, max_header=header, error=MessageError)
    shapes: Mapping[str, Any] = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if shapes != {name: tuple(p.shape) for name, p in expected.items()}:
        raise MessageError(f"{EXACT_FILE} holds other tensors than the adapter has besides its LoRA matrices")
    return {name: tensor.to(expected[name].dtype) for name, tensor in state.items()}


def _check_base(mine: Mapping[str, Any], theirs: Mapping[str, Any], remedy: str) -> None:
    for key, expected in theirs.items():
        if key != "embedding_probe" and mine.get(key) != expected:
            raise AdapterMismatchError(
                f"This adapter was made for another base model: {printable(key, 80)} is {expected!r:.80} there and "
                f"{mine.get(key)!r:.80} here. {remedy}"
            )
    try:
        check_same_base(mine, theirs, "")
    except AdapterMismatchError as error:
        raise AdapterMismatchError(
            f"This adapter was made for another base model: its embeddings differ. {remedy}"
        ) from error


def _base_name(fields: Mapping[str, Any]) -> str:
    return f"the base model {printable(fields.get('base_model_name_or_path') or 'that it was made for')}"
