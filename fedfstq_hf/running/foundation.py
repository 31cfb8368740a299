"""From a recipe to what a federation is founded on: model, training arguments, spec and round 0."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments, set_seed
from transformers.utils import find_adapter_config_file

from fedfstq_hf.adapter import AdapterView, base_fingerprint, config_json
from fedfstq_hf.adapters.allow_list import parse as parse_adapter_config
from fedfstq_hf.adapters.size import make_config
from fedfstq_hf.downlink_settings import default_downlink
from fedfstq_hf.errors import ConfigError, MailboxError
from fedfstq_hf.federation import adapter_file
from fedfstq_hf.federation.frames import drawn
from fedfstq_hf.federation.mailbox.protocol import ADAPTER_CONFIG_FILE, checked_repo
from fedfstq_hf.federation.spec import CLIENT_DEFAULTS, SHARED_DATA, SHARED_TRAINING, FederationSpec
from fedfstq_hf.generation.saliency import tokenizer_fingerprint
from fedfstq_hf.recipe import Recipe
from fedfstq_hf.text import printable

EMBEDDED_MODEL = "demo"
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")
_ROOM_FOR_HEADERS = 4096


@dataclass(frozen=True)
class Founding:
    """A base model with a fresh adapter, and its tokenizer."""

    model: PeftModel
    tokenizer: Any
    view: AdapterView
    adapter: bytes
    adapter_config: bytes


def resolve_model(name: str) -> str:
    """The path of the embedded model for `demo`, any other name as it is."""
    if name != EMBEDDED_MODEL:
        return name
    from fedfstq_hf.demo import model_path

    return str(model_path())


def load_base(name: str, dtype: str) -> tuple[Any, Any]:
    """Base model and tokenizer that somebody chose for himself. No code of the model's repo is run.

    Raises:
        ConfigError: neither a folder with a model nor a Hub id that can be reached.
    """
    return _load(name, dtype)


def load_shared_base(name: str, dtype: str) -> tuple[Any, Any]:
    """Base model and tokenizer that a mailbox names: `demo`, or a repo of the Hub with plain weights.

    No code of the repo is run: neither custom classes nor pickled weights nor attention kernels that its config names.

    Raises:
        ConfigError: a path of this machine, which is not for a mailbox to choose; an adapter, which would name another
            base; or a repo that cannot be reached or has no safetensors.
    """
    remedy = "Name the base model yourself: type --model FOLDER, or --model ORG/NAME of the Hub."
    shown = printable(name)
    if name == EMBEDDED_MODEL:
        return _load(name, dtype)
    if not _HUB_ID.fullmatch(name) or ".." in name or "--" in name:
        raise ConfigError(f"The federation names its base model {shown!r}, which is no Hub id. {remedy}")
    if os.path.lexists(name):
        raise ConfigError(
            f"The federation names its base model {shown!r}, and here that is a path, which transformers would load in "
            f"the place of the Hub's. {remedy}"
        )
    try:
        if find_adapter_config_file(resolve_model(name)) is not None:
            raise ConfigError("it is an adapter, which names another base")
        # attn_implementation=None overrules the config's, which can name a kernel to download and run
        return _load(name, dtype, use_safetensors=True, attn_implementation=None)
    except Exception as error:  # whatever files of somebody else make transformers raise
        raise ConfigError(
            f"The federation's base model {shown!r} cannot be loaded: {printable(error, 1000)}\n{remedy}"
        ) from error


def _load(name: str, dtype: str, **options: Any) -> tuple[Any, Any]:
    path = resolve_model(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, dtype), trust_remote_code=False, **options
        )
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"The base model {name!r} cannot be loaded: {error}\nGive a folder or a Hub id with --model."
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def check_client_repos(mailbox: str, names: Sequence[str]) -> None:
    """Raise `ConfigError` where the Hub takes no repo of the name that a client's would have."""
    for name in names if mailbox.startswith("hf://") else ():
        repo = f"{mailbox.removeprefix('hf://')}-{name}"
        try:
            checked_repo(repo)
        except ConfigError:
            raise ConfigError(
                f"Client {name!r} would have the Hub repo {repo}, and the Hub takes no such name: use letters, digits, "
                "and single - . or _ between them."
            ) from None


def found(recipe: Recipe, seed: int, adapter: str | None = None, base_name: str | None = None) -> Founding:
    """Load the recipe's base and give it an adapter: a new one, which is a function of the seed, or a trained one.

    Args:
        adapter: folder or Hub id of a trained one; its configuration takes the place of the recipe's.
        base_name: by which others load the base; the recipe's model where None.

    Raises:
        ConfigError: there is no such adapter, or it is not one for this base.
    """
    base, tokenizer = load_base(recipe.model, recipe.dtype)
    set_seed(seed)
    if adapter is None:
        model = get_peft_model(base, LoraConfig(**recipe.lora.peft_kwargs()))
    else:
        try:
            model = PeftModel.from_pretrained(base, adapter, is_trainable=True)
        except Exception as error:  # PEFT raises what comes its way
            raise ConfigError(
                f"{adapter} cannot be taken as the adapter to start from: {printable(error, 500)} Give the folder, or "
                f"ORG/NAME, of a PEFT adapter for {recipe.model}."
            ) from error
    view = AdapterView(model)
    initial = drawn(view.schema, seed)
    if adapter is None and initial is not None and model.peft_config[view.name].init_lora_weights is True:
        view.write(initial)  # PEFT's own distribution, by a generator that clients have as well
    model.peft_config[view.name].base_model_name_or_path = base_name or recipe.model
    return Founding(model, tokenizer, view, adapter_file.dump(view.state()), config_json(model, view.name))


def wrap_base(base: Any, adapter_config: bytes) -> PeftModel:
    """The base with a trainable adapter of a published configuration; its numbers come from the mailbox later.

    Only what allow_list.py believes reaches PEFT, and no adapter larger than the base is made. The base that the
    configuration names is not looked up: the adapter's is the one given here.

    Raises:
        MailboxError: not the configuration of an adapter that can be made on this base.
    """
    what = f"The mailbox's {ADAPTER_CONFIG_FILE}"
    fields = parse_adapter_config(adapter_config, what, MailboxError)
    try:
        config = make_config(base, fields | {"base_model_name_or_path": None}, inference_mode=False)
        return get_peft_model(base, config)
    except Exception as error:  # PEFT raises what comes its way
        raise MailboxError(f"{what} fits no adapter on this base model: {printable(error)}") from error


def make_spec(
    recipe: Recipe,
    method: str,
    founding: Founding,
    *,
    seed: int,
    min_clients: int,
    num_clients: int | None = None,
    mean_examples: int | None = None,
    changes: Mapping[str, Any] | None = None,
    everybody: bool = True,
    **rules: Any,
) -> FederationSpec:
    """The spec of a federation that runs `method` of a recipe.

    Args:
        founding: of `recipe.for_method(method)`.
        num_clients: all clients of the federation; the recipe's number where None.
        mean_examples: of its clients, for a method whose budgets follow the number of examples.
        changes: switches of the method that are otherwise than in the recipe.
        everybody: all clients are asked in every round, unless a rule says otherwise.
        rules: fields of the spec that no recipe sets.
    """
    settings = dataclasses.replace(recipe.methods[method].shared, **(changes or {}))
    if settings.budget_by_examples and mean_examples is None:
        raise ConfigError(
            f"Method {method!r} has budget_by_examples: say how many training examples a client has on average, "
            "such as --mean-examples 200."
        )
    if settings.downlink is None and not everybody:
        settings = dataclasses.replace(settings, downlink=default_downlink(settings.codec, exact=False))
    training = recipe.for_method(method).training
    return FederationSpec(
        name=recipe.name,
        model=str(founding.model.peft_config[founding.view.name].base_model_name_or_path),
        base_fingerprint={**base_fingerprint(founding.model), "tokenizer": tokenizer_fingerprint(founding.tokenizer)},
        schema=founding.view.schema.fingerprint,
        rounds=recipe.federation.rounds,
        local_steps=training.local_steps,
        max_message_bytes=4 * founding.view.schema.num_params * (2 if settings.scaffold else 1) + _ROOM_FOR_HEADERS,
        min_clients=min_clients,
        method=settings,
        num_clients=num_clients or recipe.federation.clients,
        mean_examples=mean_examples if settings.budget_by_examples else None,
        training={name: getattr(training, name) for name in SHARED_TRAINING},
        client_defaults={name: getattr(training, name) for name in CLIENT_DEFAULTS},
        data={name: getattr(recipe.data, name) for name in SHARED_DATA},
        seed=seed,
        **rules,
    )


def quiet_arguments(output_dir: str | Path, **overrides: Any) -> TrainingArguments:
    """`TrainingArguments` without checkpoints and logs: client states and mailbox hold what there is to keep.

    Raises:
        ConfigError: transformers refuses a name or a value.
    """
    settings = {
        "output_dir": str(output_dir),
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
        "remove_unused_columns": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "use_cpu": not torch.accelerator.is_available(),  # or transformers refuses bf16
    }
    try:
        return TrainingArguments(**(settings | overrides))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"transformers.TrainingArguments refuses the training settings: {error}") from error


def training_arguments(recipe: Recipe, output_dir: str | Path, **overrides: Any) -> TrainingArguments:
    """Quiet `TrainingArguments` for a recipe."""
    return quiet_arguments(output_dir, **(recipe.training.trainer_kwargs() | overrides))
