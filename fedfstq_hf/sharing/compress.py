"""Compressing a trained adapter: weigh, code, measure, describe."""

from __future__ import annotations

import hashlib
import logging
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedfstq_hf import __version__
from fedfstq_hf.adapter import base_fingerprint
from fedfstq_hf.codec import parse_budget
from fedfstq_hf.errors import AdapterMismatchError, BudgetError, ConfigError
from fedfstq_hf.federation import adapter_file
from fedfstq_hf.reporting.card.markup import is_path
from fedfstq_hf.running.evaluate import Evaluator
from fedfstq_hf.sharing.adapter_card import render_card
from fedfstq_hf.sharing.calibration import (
    Imitation,
    adapter_fisher,
    evaluating,
    even_weights,
    pair_weights,
    predicts_tokens,
)
from fedfstq_hf.sharing.coding import DEFAULT_CODEC, Coded, Coder, initial_state, refine
from fedfstq_hf.sharing.packed import EXACT_FILE, FACTS_FILE, MESSAGE_FILE, CompressedAdapter, Facts, compact_config
from fedfstq_hf.sharing.trained import (
    CONFIG_FILE,
    TrainedAdapter,
    load_task_base,
    load_trained,
    num_labels,
    read_config,
    trained_adapter,
)
from fedfstq_hf.workloads.examples import collate

Examples = Sequence[Mapping[str, Any]]
"""Rows with `input_ids` and `labels` (-100 where no loss is wanted), as lists or one-dimensional tensors."""

_MAGNITUDE = ".lora_magnitude_vector"
_TEXTS, _LENGTH, _SAMPLES = 8, 32, 8000  # by which the effect is measured: rows, tokens, samples of sound
_log = logging.getLogger(__name__)
_DESTROYED = 1.05  # an adapter that is left out is off by 1
_JUDGED = 64  # calibration examples by which one message is preferred to another
_HALF = (2.0**-14, 65504.0)  # float16's normal range: within it, rounding is at most 2^-11 of a value


def compress_adapter(
    model_or_path: nn.Module | str | Path,
    budget: str | int = "2bpp",
    *,
    base_model: nn.Module | None = None,
    calibration: Examples | None = None,
    evaluation: Examples | Callable[[nn.Module], Mapping[str, float]] | None = None,
    init_seed: int | None = None,
    refine_steps: int = 0,
    progress: bool = False,
    codec: str = DEFAULT_CODEC,
    include_plain: bool = False,
    batch_size: int = 8,
    about: Mapping[str, Any] | None = None,
    base_model_name: str | None = None,
) -> CompressedAdapter:
    """A trained LoRA adapter in few bits per parameter.

    Args:
        model_or_path: a PEFT model, or the folder of a saved adapter.
        budget: all files that loading needs, together: bits per parameter ("2bpp") or bytes ("96kB").
        base_model: to load a folder onto; without it the adapter's own `base_model_name_or_path` is loaded.
        calibration: some tens of examples of the adapter's task (one backward pass per batch), so that bits go where
            they matter; better some hundreds if `refine_steps` are taken. None: every entry of a module's B A counts
            the same.
        evaluation: held-out examples, or a function from model to metrics; measured before and after, for the card.
        init_seed: what `set_seed` was given right before `get_peft_model`, if known: then the random part of A may be
            left out. It is used only where that is smaller.
        refine_steps: of training through the rounding on the calibration examples, towards their answers and the
            predictions of the adapter as trained; each takes two forward passes and one backward pass of a batch. The
            outcome is kept only if it is better at both together on the first of the calibration examples. 0: none.
        progress: show a bar while refining.
        codec: of the LoRA matrices; the default is made for this.
        include_plain: add `adapter_model.safetensors` with the compressed adapter's values, for plain PEFT.
        batch_size: of calibration and evaluation.
        about: for the card: `name`, `license`, `datasets`, `tags`.
        base_model_name: of the base as others load it, where the adapter's configuration names a path of this machine.

    Raises:
        AdapterMismatchError: not a LoRA adapter, not one for this base, or one that cannot be shared like this.
        BudgetError: the budget cannot be read, or is too small for the other files and a header.
        ConfigError: no such codec, or refinement is asked for where it cannot be done.
        DataError: calibration or evaluation is empty.
        NonFiniteError: the adapter or the calibration's gradients hold NaN or infinity.
    """
    adapter = _open(model_or_path, base_model)
    _check_refinement(refine_steps, calibration, codec, adapter)
    state = {name: tensor.float().cpu() for name, tensor in adapter.state().items()}
    matrices = {name: state[name] for name in sorted(adapter.paired())}
    shapes = {name: tuple(tensor.shape) for name, tensor in matrices.items()}
    references = [initial_state(shapes, adapter.pairs, adapter.config, None)]
    if init_seed is not None:
        references.append(initial_state(shapes, adapter.pairs, adapter.config, init_seed))
    named = {} if base_model_name is None else {"base_model_name_or_path": base_model_name}
    base_name = (adapter.config | named)["base_model_name_or_path"]
    if is_path(base_name):
        _log.warning(
            "The base model is named %r, a path of this machine, in what others get. Type --base-model-name ORG/NAME "
            "(base_model_name=) for the name by which they load it.",
            base_name,
        )
    config = compact_config(adapter.config | named, packed=not include_plain)
    exact = _exact(adapter)
    exact_bytes = adapter_file.dump(exact) if exact else b""
    known = base_fingerprint(adapter.model).items()
    base = {name: value for name, value in known if not name.startswith("tensor_")}  # it would cost as much as a layer

    def facts(message: bytes, seed: int | None) -> bytes:
        files = {MESSAGE_FILE: message, CONFIG_FILE: config} | ({EXACT_FILE: exact_bytes} if exact else {})
        digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
        return Facts(base, seed, adapter.num_params, digests, f"fedfstq_hf {__version__}").to_json()

    total = parse_budget(budget, adapter.num_params)
    besides = len(config) + len(exact_bytes) + len(facts(b"", init_seed))
    if total <= besides:
        raise BudgetError(
            f"The budget of {budget!r} comes to {total} bytes for {adapter.num_params} parameters; configuration, "
            f"facts and tensors that are kept exactly take {besides}. Give more."
        )
    if calibration is None:
        num_examples = 0
        weights = [even_weights(state, pair) for pair in adapter.pairs]
    else:
        fisher, num_examples = adapter_fisher(
            adapter.model, {name: adapter.parameters[name] for name in matrices}, _batches(calibration, batch_size)
        )
        weights = [pair_weights(state, fisher, pair) for pair in adapter.pairs]
    coder = Coder(matrices, adapter.pairs, weights, total - besides, codec=codec, num_examples=num_examples)
    candidates = [coder.code(form) for form in coder.forms(references)]
    divergences: dict[str, float] = {}
    errors: dict[str, float] = {}
    if calibration is None or not predicts_tokens(adapter.config):
        coded = min(candidates, key=lambda one: one.error)
    else:
        imitation = Imitation(adapter, calibration, batch_size)
        coded, divergences["coded"] = _closest(imitation, candidates)
        if refine_steps:
            refined = refine(coder, coded, imitation, refine_steps, batch_size, progress)
            errors["coded"], errors["refined"] = imitation.errors([coded.state, refined.state], _JUDGED)
            if errors["refined"] < errors["coded"]:
                coded = refined
            divergences["refined"] = imitation.divergences([coded.state], _JUDGED)[0]
    result = {**coded.state, **{name: tensor.to(state[name].dtype) for name, tensor in exact.items()}}
    result |= {name: result[first] for name, first in adapter.beside().items()}
    before, after = _measure(adapter, result, evaluation, batch_size)
    effect = effect_error(adapter, result, calibration)
    if effect is not None and effect > _DESTROYED:
        raise AdapterMismatchError(
            f"With the compressed adapter the model's outputs are off by {100 * effect:.0f} % of what the adapter "
            "changes: worse than without it, so nothing was made. Give a larger budget; if this one is generous, this "
            "kind of adapter is coded wrongly here, and an issue with its adapter_config.json would help."
        )
    files = {
        MESSAGE_FILE: coded.message,
        FACTS_FILE: facts(coded.message, init_seed if coded.form.seeded else None),
        CONFIG_FILE: config,
    } | ({EXACT_FILE: exact_bytes} if exact else {})
    plain_bytes = len(adapter_file.dump(adapter.state()))
    made = CompressedAdapter(
        files=files,
        card="",
        num_params=adapter.num_params,
        plain_bytes=plain_bytes,
        error=coded.error,
        effect=effect,
        seeded=coded.form.seeded,
        refine_steps=refine_steps,
        divergences=divergences,
        errors=errors,
        plain=adapter_file.dump(result) if include_plain else None,
        before=before,
        after=after,
    )
    card = render_card(
        made,
        adapter.config | named,
        about or {},
        codec=codec,
        num_examples=num_examples,
        base_class=type(adapter.model.get_base_model()).__name__,
        num_labels=num_labels(adapter),
    )
    return replace(made, card=card)


@torch.no_grad()
def effect_error(adapter: TrainedAdapter, state: Mapping[str, Tensor], examples: Examples | None) -> float | None:
    """How far the model's outputs are off with other values in its adapter, as a share of what the adapter changes.

    |f(x; state) - f(x; adapter)| / |f(x; adapter) - f(x; none)| over the outputs of a few texts: of the examples, or of
    token ids drawn at random. It goes through the model, so that nothing that a codec takes for granted enters it.

    Returns:
        None where the adapter changes nothing, or the model does not take such inputs, which is logged.
    """
    model = adapter.model
    batches = _probes(adapter, examples)
    device = next(model.parameters()).device

    def outputs() -> list[Tensor]:
        made = []
        for batch in batches:
            found = model(**{name: tensor.to(device) for name, tensor in batch.items()})
            made.append((found.logits if "logits" in found else found[0]).double().cpu())
        return made

    with evaluating(model):
        try:
            trained = outputs()
        except Exception as error:  # a model of other inputs: what it raises is its own
            _log.warning("The model's outputs with and without compression are not compared: %s", error)
            return None
        with adapter.replaced(state):
            coded = outputs()
        with model.disable_adapter(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's, that biases which are trained stay
            without = outputs()
    change = sum(float((a - b).square().sum()) for a, b in zip(trained, without, strict=True))
    off = sum(float((a - b).square().sum()) for a, b in zip(trained, coded, strict=True))
    return math.sqrt(off / change) if change else None


def _probes(adapter: TrainedAdapter, examples: Examples | None) -> list[dict[str, Tensor]]:
    """Inputs to compare outputs on, one row each: the examples' ids, or random ids, pixels or samples of sound."""
    base: Any = adapter.model.get_base_model()
    config, generator = base.config, torch.Generator().manual_seed(0)
    if base.main_input_name == "pixel_values":
        size = getattr(config, "image_size", 224)
        height, width = (size, size) if isinstance(size, int) else size
        shape = (_TEXTS, 1, getattr(config, "num_channels", 3), height, width)
        return [{"pixel_values": image} for image in torch.randn(shape, generator=generator).to(base.dtype)]
    if base.main_input_name == "input_values":
        return [{"input_values": torch.randn(1, _SAMPLES, generator=generator).to(base.dtype)}]
    if examples:
        rows = [torch.as_tensor(row["input_ids"]) for row in examples[:_TEXTS]]
    else:
        rows = list(torch.randint(config.get_text_config().vocab_size, (_TEXTS, _LENGTH), generator=generator))
        start = adapter.config.get("alora_invocation_tokens") or []  # an activated LoRA acts after these
        for row in rows:
            row[: len(start)] = torch.tensor(start[:_LENGTH], dtype=row.dtype)
    decoded = {"decoder_input_ids"} if config.is_encoder_decoder else set()
    return [dict.fromkeys({"input_ids"} | decoded, row[None]) for row in rows]


def _check_refinement(steps: int, calibration: Examples | None, codec: str, adapter: TrainedAdapter) -> None:
    if steps == 0:
        return
    if type(steps) is not int or steps < 0:
        raise ConfigError(f"refine_steps is {steps!r}; expected 0 (none) or a number of steps, such as 200.")
    if not calibration:
        raise ConfigError("refine_steps needs calibration examples to learn from; give calibration, or refine_steps=0.")
    if codec != DEFAULT_CODEC:
        raise ConfigError(f"refine_steps is for codec {DEFAULT_CODEC!r}, not {codec!r}; leave one of them out.")
    if not predicts_tokens(adapter.config):
        raise ConfigError(
            f"refine_steps is for adapters that predict the next token (task_type CAUSAL_LM), this one's is "
            f"{adapter.config.get('task_type')}; give refine_steps=0."
        )


def _closest(imitation: Imitation, candidates: Sequence[Coded]) -> tuple[Coded, float]:
    """The candidate that predicts most like the trained adapter, the first of equals, and its divergence in nats."""
    divergences = imitation.divergences([one.state for one in candidates], _JUDGED)
    best = min(range(len(candidates)), key=divergences.__getitem__)
    return candidates[best], divergences[best]


def _open(model_or_path: nn.Module | str | Path, base_model: nn.Module | None) -> TrainedAdapter:
    if isinstance(model_or_path, nn.Module):
        return trained_adapter(model_or_path)
    folder = Path(model_or_path)
    if base_model is None:
        name = read_config(folder).get("base_model_name_or_path")
        if not name:
            raise ConfigError(f"{folder / CONFIG_FILE} names no base model; give base_model (--base-model NAME).")
        base_model = load_task_base(str(name), folder)
    return trained_adapter(load_trained(base_model, folder))


def _exact(adapter: TrainedAdapter) -> dict[str, Tensor]:
    """What is no LoRA matrix, unchanged; DoRA's magnitudes in half precision where they lie within its range."""
    exact = {}
    for name, first in adapter.beside().items():
        if name != first:
            continue  # a reader fills it from the first
        tensor = adapter.state()[name]
        size = tensor.abs()
        if name.endswith(_MAGNITUDE) and bool(((size >= _HALF[0]) & (size <= _HALF[1])).all()):
            tensor = tensor.half()
        exact[name] = tensor.cpu()
    return exact


def _batches(examples: Examples, size: int) -> Iterator[Mapping[str, Tensor]]:
    for start in range(0, len(examples), size):
        # the padding's value does not matter: it is masked, and has no label
        yield collate([examples[i] for i in range(start, min(start + size, len(examples)))], pad_id=0)


def _measure(
    adapter: TrainedAdapter,
    state: Mapping[str, Tensor],
    evaluation: Examples | Callable[[nn.Module], Mapping[str, float]] | None,
    batch_size: int,
) -> tuple[dict[str, float], dict[str, float]]:
    """Metrics of the adapter as trained, and with the values that a reader gets."""
    if evaluation is None:
        return {}, {}
    metric = evaluation if callable(evaluation) else Evaluator(list(evaluation), 0, batch_size)
    with evaluating(adapter.model), torch.no_grad():
        before = _finite(metric(adapter.model))
        with adapter.replaced(state):
            after = _finite(metric(adapter.model))
    shared: Iterable[str] = [name for name in before if name in after]
    return {name: before[name] for name in shared}, {name: after[name] for name in shared}


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items() if math.isfinite(float(value))}
